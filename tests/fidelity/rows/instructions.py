"""Dockerfile instructions, as BuildKit reads them."""

from fidelity.table import BASE, SERVER, Image, Logs, Run, Subject

SUBJECT = Subject(
    "Dockerfiles",
    "Instructions mean what they mean to BuildKit.",
    [
        Image(
            "forms",
            "ENV, ARG, WORKDIR, USER, ENTRYPOINT and CMD in their forms",
            BASE + 'ARG WHO=world\nENV GREETING="hello $WHO" LAST=yes\nWORKDIR /a\nWORKDIR b\n'
            "RUN useradd -m app && echo made > made && chown app made && for i in $(seq 40); do echo g$i:x:$((5000 + i)):app >> /etc/group; done\nUSER app\nCOPY server /server\nEXPOSE 8080\n"
            'ENTRYPOINT ["/server"]\nCMD ["8080"]\n',
            [
                Run("ENV expands ARG", "echo $GREETING $LAST", "hello world yes"),
                Run("a relative WORKDIR is below the one before", "pwd; cat made", "/a/b\nmade"),
                Run("USER is who the application runs as", "id -un; echo $HOME", "app\n/home/app"),
                Run("in all of its groups", "id -G | wc -w", "41"),
            ],
        ),
        Image(
            "run-fails",
            "a RUN step that fails",
            BASE + "RUN echo before && exit 3\n" + SERVER,
            [Logs("the log has what the step printed", "before", build=True)],
            fails=r"The container image build failed\.",
        ),
    ],
)
