"""Shapes of images in other languages."""

from fidelity.table import BASE, Check, Get, Image, Sleep, Subject

STAGE = "FROM public.ecr.aws/lambda/microvms:al2023-minimal AS build\n"
MAIN = (
    "import com.sun.net.httpserver.*;\nimport java.net.*;\npublic class Main { public static void main(String[] a) throws Exception {\n"
    "  HttpServer s = HttpServer.create(new InetSocketAddress(8080), 0);\n"
    '  s.createContext("/", x -> { byte[] b = "hello\\n".getBytes(); x.sendResponseHeaders(200, b.length); x.getResponseBody().write(b); x.close(); });\n  s.start();\n} }\n'
)
POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>app</groupId><artifactId>app</artifactId><version>1</version>
  <properties>
    <maven.compiler.release>17</maven.compiler.release>
    <project.build.sourceEncoding>UTF-8</project.build.sourceEncoding>
  </properties>
  <build><plugins>
    <plugin>
      <artifactId>maven-jar-plugin</artifactId>
      <configuration><archive><manifest><mainClass>Main</mainClass></manifest></archive></configuration>
    </plugin>
  </plugins></build>
</project>
"""
SPRING = """\
import org.apache.catalina.startup.Tomcat;
import org.springframework.web.bind.annotation.*;
import org.springframework.web.context.support.AnnotationConfigWebApplicationContext;
import org.springframework.web.servlet.DispatcherServlet;
import org.springframework.web.servlet.mvc.method.annotation.*;

@RestController
public class App {
    @RequestMapping(path = "/", method = RequestMethod.GET)
    public String root() { return "hello"; }

    public static void main(String[] words) throws Exception {
        AnnotationConfigWebApplicationContext context = new AnnotationConfigWebApplicationContext();
        context.register(App.class, RequestMappingHandlerMapping.class, RequestMappingHandlerAdapter.class);
        Tomcat tomcat = new Tomcat();
        tomcat.setBaseDir("/tmp/tomcat");
        tomcat.setPort(8080);
        tomcat.getConnector();
        org.apache.catalina.Context root = tomcat.addContext("", "/tmp");
        Tomcat.addServlet(root, "spring", new DispatcherServlet(context)).setLoadOnStartup(1);
        root.addServletMappingDecoded("/", "spring");
        tomcat.start();
        tomcat.getServer().await();
    }
}
"""


def answers(words: str, says: str = "answers", within: float = 120) -> list[Check]:
    return [Get(says, contains=words, within=within), Sleep(), Get("and after a sleep", contains=words, within=60)]


HELLO = answers("hello")

SUBJECT = Subject(
    "Other languages",
    "Compilers and runtimes are the base's packages.",
    [
        Image(
            "go-scratch",
            "Go: a static program in FROM scratch, cache mounts of modules and of the build",
            STAGE + "RUN dnf install -y golang\nWORKDIR /src\nCOPY go.mod main.go ./\nENV CGO_ENABLED=0\n"
            "RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \\\n    go build -trimpath -ldflags='-s -w' -o /bin/server .\n"
            'FROM scratch\nCOPY --from=build /bin/server /server\nEXPOSE 8080\nENTRYPOINT ["/server"]\n',
            HELLO,
            {
                "go.mod": "module app\n\ngo 1.19\n",
                "main.go": 'package main\nimport ("fmt"; "net/http")\nfunc main() {\n\thttp.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello") })\n'
                '\tif err := http.ListenAndServe(":8080", nil); err != nil { panic(err) }\n}\n',
            },
            long=True,
        ),
        Image(
            "docker-init-go",
            "`docker init` for Go: bind mounts of go.mod, ARG TARGETARCH, a user of its own",
            "# syntax=docker/dockerfile:1\nFROM --platform=$BUILDPLATFORM public.ecr.aws/lambda/microvms:al2023-minimal AS build\nRUN dnf install -y golang\nWORKDIR /src\n"
            "RUN --mount=type=cache,target=/go/pkg/mod/ \\\n    --mount=type=bind,source=go.mod,target=go.mod \\\n    go mod download -x\n"
            "ARG TARGETARCH\nRUN --mount=type=cache,target=/go/pkg/mod/ \\\n    --mount=type=bind,target=. \\\n    CGO_ENABLED=0 GOARCH=$TARGETARCH go build -buildvcs=false -o /bin/server .\n"
            "FROM public.ecr.aws/lambda/microvms:al2023-minimal AS final\nRUN dnf install -y ca-certificates tzdata shadow-utils\nARG UID=10001\n"
            'RUN useradd --system --home-dir "/nonexistent" --shell "/sbin/nologin" --no-create-home --uid "${UID}" appuser\nUSER appuser\n'
            'COPY --from=build /bin/server /bin/\nEXPOSE 8080\nENTRYPOINT [ "/bin/server" ]\n',
            answers("hello 10001\n", "answers as its user"),
            {
                "go.mod": "module app\n\ngo 1.19\n",
                "main.go": 'package main\nimport ("fmt"; "net/http"; "os")\nfunc main() {\n\thttp.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello", os.Getuid()) })\n'
                '\tif err := http.ListenAndServe(":8080", nil); err != nil { panic(err) }\n}\n',
            },
            long=True,
        ),
        Image(
            "rust",
            "`docker init` for Rust: cargo with cache mounts",
            STAGE + "RUN dnf install -y rust cargo gcc\nWORKDIR /app\n"
            "RUN --mount=type=bind,source=src,target=src \\\n    --mount=type=bind,source=Cargo.toml,target=Cargo.toml \\\n    --mount=type=cache,target=/app/target/ \\\n"
            "    cargo build --release && cp ./target/release/app /bin/server\n"
            + BASE
            + 'COPY --from=build /bin/server /bin/\nEXPOSE 8080\nCMD ["/bin/server"]\n',
            HELLO,
            {
                "Cargo.toml": '[package]\nname = "app"\nversion = "0.1.0"\nedition = "2021"\n',
                "src/main.rs": 'use std::io::{Read, Write};\nfn main() {\n    for s in std::net::TcpListener::bind("0.0.0.0:8080").unwrap().incoming() {\n'
                "        let mut s = s.unwrap();\n        let _ = s.read(&mut [0; 4096]);\n"
                '        let _ = s.write_all(b"HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\nConnection: close\\r\\n\\r\\nhello\\n");\n    }\n}\n',
            },
            long=True,
        ),
        Image(
            "java-single",
            "Java: a program of one file, compiled in one stage, run on a headless JRE",
            STAGE
            + "RUN dnf install -y java-17-amazon-corretto-devel\nCOPY Main.java /src/\nRUN javac -d /out /src/Main.java\n"
            + BASE
            + 'RUN dnf install -y java-17-amazon-corretto-headless\nCOPY --from=build /out /app\nEXPOSE 8080\nENTRYPOINT ["java", "-cp", "/app", "-Xmx256m", "Main"]\n',
            HELLO,
            {"Main.java": MAIN},
            long=True,
        ),
        Image(
            "docker-init-java",
            "`docker init` for Java: Maven with its repository in a cache mount, a stage each for dependencies, package and run",
            "# syntax=docker/dockerfile:1\n"
            + STAGE.replace(" AS build", " AS deps")
            + "RUN dnf install -y java-17-amazon-corretto-devel maven "
            "libmaven-resources-plugin-java libmaven-compiler-plugin-java libsurefire-java libmaven-jar-plugin-java\nWORKDIR /build\n"
            "RUN --mount=type=bind,source=pom.xml,target=pom.xml \\\n    --mount=type=bind,source=settings.xml,target=settings.xml \\\n    --mount=type=cache,target=/root/.m2 mvn -s settings.xml -q validate\n"
            "FROM deps AS package\nWORKDIR /build\nCOPY ./src src/\n"
            "RUN --mount=type=bind,source=pom.xml,target=pom.xml \\\n    --mount=type=bind,source=settings.xml,target=settings.xml \\\n    --mount=type=cache,target=/root/.m2 \\\n"
            "    mvn -s settings.xml package -DskipTests && mv target/app-1.jar target/app.jar\n"
            + STAGE.replace(" AS build", " AS final")
            + "RUN dnf install -y java-17-amazon-corretto-headless shadow-utils\nARG UID=10001\n"
            'RUN useradd --system --home-dir "/nonexistent" --shell "/sbin/nologin" --no-create-home --uid "${UID}" appuser\nUSER appuser\n'
            'COPY --from=package build/target/app.jar app.jar\nEXPOSE 8080\nENTRYPOINT [ "java", "-jar", "app.jar" ]\n',
            HELLO,
            {
                "pom.xml": POM,
                "settings.xml": "<settings><localRepository>/usr/share/maven-repo</localRepository><offline>true</offline></settings>\n",
                "src/main/java/Main.java": MAIN,
            },
            note="Maven's plugins come from Debian's packages where Maven's repository cannot be reached",
            long=True,
        ),
        Image(
            "spring",
            "Spring MVC in an embedded Tomcat, as Spring Boot starts it",
            STAGE + "RUN dnf install -y java-17-amazon-corretto-devel libspring-web-servlet-java libtomcat9-java\n"
            "COPY App.java /src/\nRUN mkdir /lib-of && cd /usr/share/java && cp -L spring3-*.jar tomcat9-*.jar commons-logging.jar /lib-of/ && javac --release 8 -cp '/lib-of/*' -d /out /src/App.java\n"
            + BASE
            + "RUN dnf install -y java-17-amazon-corretto-headless\nCOPY --from=build /lib-of /app/lib\nCOPY --from=build /out /app/classes\nWORKDIR /app\nEXPOSE 8080\n"
            'ENTRYPOINT ["java", "-cp", "classes:lib/*", "App"]\n',
            answers("hello", within=300),
            {"App.java": SPRING},
            note="Spring's libraries come from Debian's packages where Maven's repository cannot be reached",
            long=True,
        ),
        Image(
            "aspnet",
            "ASP.NET, by the packages that Amazon Linux has",
            BASE + 'RUN dnf install -y aspnetcore-runtime-8.0\nCOPY . /app\nENTRYPOINT ["dotnet", "/app/app.dll"]\n',
            fails="there is no .NET here: write `RUN curl -fsSL https://dot.net/v1/dotnet-install.sh",
            note="Debian has no .NET; Microsoft's script brings it where its host is reached",
            long=True,
        ),
        Image(
            "tomcat",
            "a servlet container with a JSP page",
            BASE
            + 'RUN dnf install -y tomcat10 && rm -rf /var/lib/tomcat10/webapps/ROOT/*\nCOPY <<END /var/lib/tomcat10/webapps/ROOT/index.jsp\n<%= "hello " + (40 + 2) %>\nEND\n'
            "ENV CATALINA_HOME=/usr/share/tomcat10 CATALINA_BASE=/var/lib/tomcat10\nEXPOSE 8080\n"
            'CMD ["/usr/share/tomcat10/bin/catalina.sh", "run"]\n',
            [
                Get("the page is compiled and served", contains="hello 42", within=300),
                Sleep(),
                Get("and after a sleep", contains="hello 42", within=60),
            ],
            note="AL2023 has no tomcat10 package; the local base has Debian's, whose start page (ROOT/index.html) comes before an index.jsp until it is removed",
            long=True,
        ),
        Image(
            "ruby-sinatra",
            "Ruby: Sinatra on Puma",
            BASE
            + 'RUN dnf install -y ruby ruby-sinatra puma\nCOPY app.rb config.ru /app/\nWORKDIR /app\nEXPOSE 9292\nCMD ["puma", "-b", "tcp://0.0.0.0:9292"]\n',
            [
                Get("answers", port=9292, contains="hello", within=120),
                Sleep(),
                Get("and after a sleep", port=9292, contains="hello", within=60),
            ],
            {
                "app.rb": "require 'sinatra/base'\nclass App < Sinatra::Base\n  get('/') { 'hello' }\nend\n",
                "config.ru": "require './app'\nrun App\n",
            },
            note="gems come from Debian's packages where no gem registry can be reached",
            long=True,
        ),
        Image(
            "rails",
            "Ruby on Rails, a new application",
            BASE + "RUN dnf install -y rails ruby-dev sqlite gcc make\nWORKDIR /srv\n"
            "RUN rails new app --minimal --skip-bundle --skip-git --database=sqlite3\nWORKDIR /srv/app\n"
            "RUN sed -i '/debug\\|tzinfo-data/d' Gemfile && bundle install --local\n"
            "RUN echo 'Rails.application.config.hosts << /.*[.]lambda-microvm[.].*/' >> config/environments/development.rb\nENV RAILS_ENV=development\nEXPOSE 3000\n"
            'CMD ["bundle", "exec", "rails", "server", "-b", "0.0.0.0", "-p", "3000"]\n',
            [
                Get("its page is served", port=3000, contains="Rails", within=300),
                Sleep(),
                Get("and after a sleep", port=3000, contains="Rails", within=90),
            ],
            note="gems come from Debian's packages where no gem registry can be reached; development mode answers to the names in `config.hosts` "
            "only, and the endpoint's is none of them",
            long=True,
        ),
        Image(
            "php-fpm-nginx",
            "PHP: php-fpm by its socket below /run, nginx before it, supervisord",
            BASE
            + "RUN dnf install -y php-fpm nginx supervisor\nCOPY index.php /var/www/html/\nCOPY nginx.conf /etc/nginx/nginx.conf\nCOPY supervisord.conf /etc/supervisord.conf\n"
            "RUN mkdir -p /run/php-fpm && sed -i 's|^listen = .*|listen = /run/php-fpm/www.sock|' /etc/php-fpm.d/www.conf\n"
            'EXPOSE 8080\nCMD ["supervisord", "-n", "-c", "/etc/supervisord.conf"]\n',
            [Get("PHP answers", contains="hello 42", within=120), Sleep(), Get("and after a sleep", contains="hello 42", within=60)],
            {
                "index.php": "<?php echo 'hello ' . (40 + 2);\n",
                "nginx.conf": "user www-data;\nevents {}\nhttp { server { listen 8080; root /var/www/html; index index.php;\n"
                "location ~ \\.php$ { include fastcgi_params; fastcgi_param SCRIPT_FILENAME $document_root$fastcgi_script_name; fastcgi_pass unix:/run/php-fpm/www.sock; } } }\n",
                "supervisord.conf": "[supervisord]\nnodaemon=true\nuser=root\n[program:fpm]\ncommand=php-fpm -F\n[program:nginx]\ncommand=nginx -g 'daemon off;'\n",
            },
            long=True,
        ),
        Image(
            "php-builtin",
            "PHP's own server",
            BASE + "RUN dnf install -y php-cli\nCOPY index.php /app/\nEXPOSE 8080\nCMD php -S 0.0.0.0:8080 -t /app\n",
            answers("hello 42"),
            {"index.php": "<?php echo 'hello ' . (40 + 2);\n"},
            long=True,
        ),
        Image(
            "laravel",
            "Laravel's framework in a front controller",
            BASE
            + "RUN dnf install -y php-cli php-mbstring php-xml php-laravel-framework\nCOPY index.php /app/\nEXPOSE 8080\nCMD php -S 0.0.0.0:8080 /app/index.php\n",
            answers("hello 42"),
            {
                "index.php": "<?php require 'Illuminate/autoload.php';\n"
                "echo Illuminate\\Support\\Str::lower('HELLO'), ' ', Illuminate\\Support\\Collection::make([40, 2])->sum();\n"
            },
            note="Composer's packages come from Debian where its registry cannot be reached",
            long=True,
        ),
        Image(
            "perl-mojolicious",
            "Perl: Mojolicious",
            BASE
            + 'RUN dnf install -y libmojolicious-perl\nCOPY app.pl /app.pl\nEXPOSE 3000\nCMD ["perl", "/app.pl", "daemon", "-l", "http://*:3000"]\n',
            [
                Get("answers", port=3000, contains="hello", within=120),
                Sleep(),
                Get("and after a sleep", port=3000, contains="hello", within=60),
            ],
            {"app.pl": "use Mojolicious::Lite -signatures;\nget '/' => sub ($c) { $c->render(text => 'hello') };\napp->start;\n"},
            long=True,
        ),
        Image(
            "elixir",
            "Elixir: a server on the BEAM",
            BASE + 'RUN dnf install -y elixir\nCOPY app.exs /app.exs\nENV LANG=C.UTF-8\nEXPOSE 8080\nCMD ["elixir", "/app.exs"]\n',
            HELLO,
            {
                "app.exs": "{:ok, l} = :gen_tcp.listen(8080, [:binary, active: false, reuseaddr: true])\n"
                "serve = fn serve -> {:ok, s} = :gen_tcp.accept(l); :gen_tcp.recv(s, 0)\n"
                '  :gen_tcp.send(s, "HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\nConnection: close\\r\\n\\r\\nhello\\n"); :gen_tcp.close(s); serve.(serve) end\nserve.(serve)\n'
            },
            long=True,
        ),
        Image(
            "c-static",
            "C: a static program, compiled in one stage, run as a numeric user",
            STAGE
            + "RUN dnf install -y gcc glibc-static\nCOPY hello.c /\nRUN gcc -static -O2 -o /hello /hello.c\nFROM scratch\nCOPY --from=build /hello /hello\nUSER 65534:65534\n"
            'EXPOSE 8080\nCMD ["/hello"]\n',
            answers("hello 65534\n", "answers as its user"),
            {
                "hello.c": "#include <netinet/in.h>\n#include <stdio.h>\n#include <sys/socket.h>\n#include <unistd.h>\nint main(void) {\n"
                "    int l = socket(AF_INET, SOCK_STREAM, 0);\n    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(8080)};\n"
                "    bind(l, (void *)&a, sizeof a), listen(l, 16);\n    for (int c; (c = accept(l, 0, 0)) >= 0; close(c)) {\n        char b[4096];\n        read(c, b, sizeof b);\n"
                '        dprintf(c, "HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\nhello %d\\n", getuid());\n    }\n}\n'
            },
            long=True,
        ),
        Image(
            "r",
            "R: a server of its own sockets",
            BASE + 'RUN dnf install -y R-core\nCOPY app.R /app.R\nEXPOSE 8080\nCMD ["Rscript", "/app.R"]\n',
            HELLO,
            {
                "app.R": "s <- serverSocket(8080)\nrepeat {\n  c <- socketAccept(s, open = 'r+b', blocking = TRUE)\n  readLines(c, 1)\n"
                "  writeBin(charToRaw('HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\nConnection: close\\r\\n\\r\\nhello\\n'), c)\n  close(c)\n}\n"
            },
            long=True,
        ),
    ],
    corpus=True,
)
