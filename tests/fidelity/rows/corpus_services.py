"""Shapes of images that run services."""

from fidelity.table import BASE, SERVER, Get, Image, Logs, Run, Sleep, Subject

WEBSOCKET = {
    "Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13", "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec_WebSocket_Protocol": "mqtt",
}  # fmt: skip

SUBJECT = Subject(
    "Services",
    "Databases, web servers, supervisors and tools, started as their users start them.",
    [
        Image(
            "postgresql",
            "PostgreSQL with its defaults, as its own user",
            BASE
            + "RUN dnf install -y postgresql15-server postgresql15\nCOPY start /start\n"
            + SERVER.replace('CMD ["/server"]', 'CMD ["/start"]'),
            [
                Run(
                    "a table is made",
                    "su postgres -c 'psql -qc \"create table t as select generate_series(1, 1000) x\"'; echo made",
                    ".*made",
                ),
                Sleep(),
                Run("and there after a sleep", "su postgres -c 'psql -Atc \"select sum(x) from t\"'", "500500"),
            ],
            {
                "start": "#!/bin/sh\nset -e\nbin=$(dirname $(find / -name initdb -type f 2>/dev/null | head -1))\nexport PATH=$PATH:$bin\n"
                'install -d -o postgres /data && su postgres -c "$bin/initdb -D /data" >/dev/null\nsu postgres -c "$bin/pg_ctl -D /data -w start"\nexec /server\n'
            },
            long=True,
        ),
        Image(
            "redis",
            "Redis with an append-only file",
            BASE + "RUN dnf install -y redis6\nCOPY start /start\n" + SERVER.replace('CMD ["/server"]', 'CMD ["/start"]'),
            [
                Run("counts", "redis-cli incr n", "1"),
                Sleep(),
                Run("goes on after a sleep", "redis-cli incr n", "2"),
            ],
            {"start": "#!/bin/sh\n(redis6-server --appendonly yes || redis-server --appendonly yes) &\nexec /server\n"},
            long=True,
        ),
        Image(
            "mariadb",
            "MariaDB, initialised in the build",
            BASE
            + "RUN dnf install -y mariadb1011-server && mkdir -p /run/mysqld && chown mysql /run/mysqld\nCOPY start /start\n"
            + SERVER.replace('CMD ["/server"]', 'CMD ["/start"]'),
            [
                Run(
                    "a database is made",
                    "until mariadb -e 'create database d; create table d.t (x int); insert into d.t values (42)'; do sleep 1; done; echo made",
                    ".*made",
                ),
                Sleep(),
                Run("and there after a sleep", "mariadb -Ne 'select x from d.t'", "42"),
            ],
            {
                "start": "#!/bin/sh\n[ -d /var/lib/mysql/mysql ] || mariadb-install-db --user=mysql >/dev/null\nmariadbd --user=mysql &\nexec /server\n"
            },
            long=True,
        ),
        Image(
            "nginx-unprivileged",
            "nginx as www-data, its log to /dev/stdout",
            BASE
            + 'RUN dnf install -y nginx\nCOPY nginx.conf /etc/nginx/nginx.conf\nRUN mkdir -p /tmp/n && chown 33 /tmp/n\nUSER 33\nEXPOSE 8080\nCMD ["nginx", "-g", "daemon off;"]\n',
            [Get("answers", contains="hello"), Logs("the access log is the microVM's log", "GET / HTTP")],
            {
                "nginx.conf": "pid /tmp/n/pid;\nerror_log /dev/stderr;\nevents {}\nhttp { access_log /dev/stdout; client_body_temp_path /tmp/n/b; proxy_temp_path /tmp/n/p; fastcgi_temp_path /tmp/n/f;\n"
                "uwsgi_temp_path /tmp/n/u; scgi_temp_path /tmp/n/s; server { listen 8080; location / { return 200 hello; } } }\n"
            },
            long=True,
        ),
        Image(
            "httpd",
            "Apache httpd in the foreground",
            BASE
            + 'RUN dnf install -y httpd\nRUN mkdir -p /var/www/html && echo hello > /var/www/html/index.html\nEXPOSE 80\nCMD ["httpd", "-D", "FOREGROUND"]\n',
            [Get("answers", port=80, contains="hello", within=60), Sleep(), Get("and after a sleep", port=80, contains="hello")],
            long=True,
        ),
        Image(
            "haproxy",
            "HAProxy before the application",
            BASE
            + "RUN dnf install -y haproxy\nCOPY haproxy.cfg /haproxy.cfg\nCOPY server /server\nEXPOSE 8000\nCMD /server 8081 & exec haproxy -f /haproxy.cfg\n",
            [
                Get("answers by the proxy", port=8000, contains="hello", within=60),
                Sleep(),
                Get("and after a sleep", port=8000, contains="hello"),
            ],
            {
                "haproxy.cfg": "defaults\n mode http\n timeout client 30s\n timeout server 30s\n timeout connect 5s\nfrontend f\n bind :8000\n default_backend b\nbackend b\n server a 127.0.0.1:8081\n"
            },
            long=True,
        ),
        Image(
            "memcached",
            "memcached as nobody",
            BASE + "RUN dnf install -y memcached python3\nCOPY start /start\n" + SERVER.replace('CMD ["/server"]', 'CMD ["/start"]'),
            [
                Run(
                    "keeps a value",
                    "python3 -c \"import socket; s = socket.create_connection(('127.0.0.1', 11211)); s.send(b'set a 0 0 2\\r\\n42\\r\\n'); print(s.recv(99).decode())\"",
                    "STORED",
                ),
                Sleep(),
                Run(
                    "over a sleep",
                    "python3 -c \"import socket; s = socket.create_connection(('127.0.0.1', 11211)); s.send(b'get a\\r\\n'); print(s.recv(99).decode())\"",
                    "VALUE a 0 2.*42.*",
                ),
            ],
            {"start": "#!/bin/sh\nmemcached -u nobody &\nexec /server\n"},
            long=True,
        ),
        Image(
            "sshd",
            "sshd, and a client in the same microVM",
            BASE
            + "RUN dnf install -y openssh-server openssh-clients && ssh-keygen -A && mkdir -p /run/sshd /root/.ssh && chmod 700 /root/.ssh && ssh-keygen -qN '' -f /root/.ssh/id && "
            "cp /root/.ssh/id.pub /root/.ssh/authorized_keys\nCOPY start /start\n" + SERVER.replace('CMD ["/server"]', 'CMD ["/start"]'),
            [
                Run("a client gets in", "ssh -i /root/.ssh/id -o StrictHostKeyChecking=no root@127.0.0.1 echo in 2>/dev/null", "in"),
                Sleep(),
                Run("and after a sleep", "ssh -i /root/.ssh/id -o StrictHostKeyChecking=no root@127.0.0.1 echo in 2>/dev/null", "in"),
            ],
            {"start": "#!/bin/sh\n/usr/sbin/sshd -D &\nexec /server\n"},
            long=True,
        ),
        Image(
            "supervisord",
            "supervisord restarts what ends",
            BASE
            + 'RUN dnf install -y supervisor\nCOPY s.conf /s.conf\nCOPY server /server\nEXPOSE 8080\nCMD ["supervisord", "-n", "-c", "/s.conf"]\n',
            [
                Run(
                    "a program that ended is started again",
                    "n=$(wc -l < /count); for i in $(seq 20); do sleep 1; [ $(wc -l < /count) -gt $n ] && echo again && break; done",
                    "again",
                ),
                Logs("its words are in the log", "entered RUNNING state"),
            ],
            {
                "s.conf": "[supervisord]\nnodaemon=true\nuser=root\n[program:server]\ncommand=/server\n[program:once]\ncommand=sh -c 'echo x >> /count; exec sleep 1'\nautorestart=true\nstartsecs=0\n"
            },
            long=True,
        ),
        Image(
            "tini",
            "tini reaps what the application leaves",
            BASE
            + 'RUN dnf install -y tini procps-ng\nCOPY server /server\nEXPOSE 8080\nENTRYPOINT ["tini", "-g", "--"]\nCMD ["/server"]\n',
            [Run("no zombie stays", "(sh -c 'sleep 0.1 &'); sleep 1; ps -eo stat | grep -c Z || true", "0")],
            long=True,
        ),
        Image(
            "s6",
            "s6-svscan with two services",
            BASE
            + 'RUN dnf install -y s6\nCOPY server /server\nCOPY one /services/web/run\nCOPY two /services/tick/run\nEXPOSE 8080\nCMD ["s6-svscan", "/services"]\n',
            [
                Run("both run", "sleep 1; s6-svstat /services/web | cut -c1-2; test -s /ticks && echo ticks", "up\nticks"),
                Sleep(),
                Run("and after a sleep", "s6-svstat /services/tick | cut -c1-2", "up"),
            ],
            {"one": "#!/bin/sh\nexec /server\n", "two": "#!/bin/sh\nwhile :; do echo x >> /ticks; sleep 0.3; done\n"},
            long=True,
        ),
        Image(
            "cron",
            "cron beside the application",
            BASE
            + "RUN dnf install -y cronie\nRUN echo '* * * * * root date >> /ticks' > /etc/cron.d/tick\nCOPY start /start\n"
            + SERVER.replace('CMD ["/server"]', 'CMD ["/start"]'),
            [Run("its job runs", "for i in $(seq 75); do [ -s /ticks ] && break; sleep 1; done; wc -l < /ticks", "[1-9]")],
            {"start": "#!/bin/sh\n(crond || cron)\nexec /server\n"},
            note="a job that was due while the microVM slept is late by the whole sleep",
            long=True,
        ),
        Image(
            "gosu-entrypoint",
            'an entry point that drops to a user, with exec "$@"',
            BASE
            + 'RUN dnf install -y util-linux && useradd -m app\nCOPY entry /entry\nCOPY server /server\nEXPOSE 8080\nENTRYPOINT ["/entry"]\nCMD ["/server"]\n',
            [Run("the application is the user", "id -un; echo $READY", "app\nyes")],
            {"entry": '#!/bin/sh\nset -e\nexport READY=yes\nexec setpriv --reuid app --regid app --clear-groups "$@"\n'},
            long=True,
        ),
        Image(
            "mosquitto-websockets",
            "an MQTT broker over WebSockets",
            BASE
            + 'RUN dnf install -y mosquitto\nRUN printf \'listener 1883\\nlistener 9001\\nprotocol websockets\\nallow_anonymous true\\n\' > /m.conf\nEXPOSE 9001\nCMD ["mosquitto", "-c", "/m.conf"]\n',
            [
                Get("a client's WebSocket is opened", "/mqtt", 9001, 101, fields=WEBSOCKET, within=60),
                Sleep(),
                Get("and after a sleep", "/mqtt", 9001, 101, fields=WEBSOCKET, within=60),
            ],
            long=True,
        ),
        Image(
            "git-server",
            "a Git repository over HTTP",
            BASE
            + "RUN dnf install -y git python3\nRUN git init -q --bare /srv/r.git && git -C /srv/r.git update-server-info && git init -q /w && cd /w && git config user.email a@b && git config user.name a && "
            "echo x > f && git add f && git commit -qm x && git push -q /srv/r.git HEAD:master && git -C /srv/r.git update-server-info\nEXPOSE 8080\n"
            'CMD ["python3", "-m", "http.server", "-d", "/srv", "8080"]\n',
            [Get("its references are served", "/r.git/info/refs", contains="refs/heads/master", within=60)],
            long=True,
        ),
        Image(
            "chromium",
            "headless Chromium takes a picture",
            BASE + 'RUN dnf install -y chromium && useradd -m c\nCOPY server /server\nUSER c\nEXPOSE 8080\nCMD ["/server"]\n',
            [
                Run(
                    "as a user, with its own sandbox",
                    "cd /tmp && chromium --headless --disable-gpu --screenshot=/tmp/a.png --window-size=200,200 'data:text/html,<h1>hi</h1>' >/tmp/out 2>&1; head -c 4 /tmp/a.png | tail -c 3",
                    "PNG",
                )
            ],
            note="as root give --no-sandbox, as everywhere",
            long=True,
            request={"resources": [{"minimumMemoryInMiB": 1024}]},
        ),
        Image(
            "xvfb",
            "a screen of Xvfb's and a picture of it",
            BASE
            + "RUN dnf install -y xorg-x11-server-Xvfb ImageMagick xeyes || dnf install -y xvfb imagemagick x11-apps\nCOPY start /start\n"
            + SERVER.replace('CMD ["/server"]', 'CMD ["/start"]'),
            [Run("a picture is taken", "import -display :1 -window root /tmp/a.png && head -c 4 /tmp/a.png | tail -c 3", "PNG")],
            {"start": "#!/bin/sh\nXvfb :1 -screen 0 320x240x24 &\nexec /server\n"},
            long=True,
        ),
        Image(
            "ffmpeg",
            "ffmpeg makes a film",
            BASE + "RUN dnf install -y ffmpeg\n" + SERVER,
            [
                Run(
                    "of one second",
                    "ffmpeg -v error -f lavfi -i testsrc=d=1:s=160x120 -y /tmp/a.mp4 && ffprobe -v error -show_entries format=duration -of csv=p=0 /tmp/a.mp4",
                    "1\\.0+",
                )
            ],
            note="AL2023 has no ffmpeg package; the local base has Debian's",
            long=True,
        ),
        Image(
            "tesseract",
            "ImageMagick draws words, Tesseract reads them",
            BASE + "RUN dnf install -y ImageMagick tesseract dejavu-sans-fonts\n" + SERVER,
            [
                Run(
                    "reads what was drawn",
                    "convert -size 400x100 -pointsize 48 -font DejaVu-Sans label:HELLO /tmp/a.png && tesseract /tmp/a.png - 2>/dev/null",
                    "HELLO",
                )
            ],
            note="AL2023 has no tesseract package; the local base has Debian's",
            long=True,
        ),
        Image(
            "libreoffice",
            "LibreOffice makes a PDF",
            BASE + "RUN dnf install -y libreoffice-writer-nogui\n" + SERVER,
            [
                Run(
                    "of a text",
                    "cd /tmp && echo hello > a.txt && soffice --headless --convert-to pdf a.txt >/dev/null 2>&1; head -c 4 a.pdf",
                    "%PDF",
                )
            ],
            note="AL2023 has no LibreOffice; the local base has Debian's",
            long=True,
        ),
        Image(
            "caddy",
            "Caddy without TLS of its own",
            BASE
            + 'RUN dnf install -y caddy\nRUN printf \':8080\\nrespond hello\\n\' > /Caddyfile\nEXPOSE 8080\nCMD ["caddy", "run", "--config", "/Caddyfile"]\n',
            [Get("answers", contains="hello", within=60), Sleep(), Get("and after a sleep", contains="hello")],
            note="AL2023 has no Caddy; the local base has Debian's",
            long=True,
        ),
        Image(
            "etcd",
            "etcd",
            BASE
            + 'RUN dnf install -y etcd-server\nEXPOSE 2379\nCMD ["etcd", "--data-dir", "/data", "--listen-client-urls", "http://0.0.0.0:2379", "--advertise-client-urls", "http://127.0.0.1:2379"]\n',
            [
                Get("is healthy", "/health", 2379, contains="true", within=120),
                Sleep(),
                Get("and after a sleep", "/health", 2379, contains="true", within=60),
            ],
            note="AL2023 has no etcd; the local base has Debian's",
            long=True,
        ),
        Image(
            "prometheus",
            "Prometheus as an unprivileged user",
            BASE
            + 'RUN dnf install -y prometheus\nUSER 65534\nWORKDIR /tmp\nEXPOSE 9090\nCMD ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/tmp/data"]\n',
            [
                Get("is ready", "/-/ready", 9090, contains="(?i)ready", within=120),
                Sleep(),
                Get("and after a sleep", "/-/ready", 9090, within=60),
            ],
            note="AL2023 has no Prometheus; the local base has Debian's",
            long=True,
        ),
    ],
    corpus=True,
)
