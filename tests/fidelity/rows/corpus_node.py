"""Shapes of Node.js images that people write."""

from fidelity.table import BASE, Get, Image, Sleep, Subject

NODE = BASE + "RUN dnf install -y nodejs npm && dnf clean all\n"
SERVER = (
    "const http = require('http');\nlet hits = 0;\n"
    "http.createServer((q, r) => r.end(`hits ${++hits}\\n`)).listen(process.env.PORT || 3000);\n"
)
COUNTS = [
    Get("answers", port=3000, contains="hits 1\\b", within=120),
    Sleep(),
    Get("its memory is as before the sleep", port=3000, contains="hits 2\\b", within=60),
]


def _package(extra: str = "", **dependencies: str) -> str:
    listed = ", ".join(f'"{name.replace("_", "-")}": "{version}"' for name, version in dependencies.items())
    return f'{{"name": "app", "version": "1.0.0", "private": true, "main": "server.js"{extra}, "dependencies": {{{listed}}}}}\n'


EXPRESS = (
    "const express = require('express');\nconst app = express();\nlet hits = 0;\n"
    "app.get('/', (q, r) => r.send(`hits ${++hits}`));\napp.listen(3000, '0.0.0.0');\n"
)

SUBJECT = Subject(
    "Node.js applications",
    "Built as their users build them; packages come from the npm registry.",
    [
        Image(
            "docker-init-node",
            "`docker init` for Node: relative bind mounts, a cache mount, USER node",
            "# syntax=docker/dockerfile:1\n\nARG NODE_VERSION=20\n\nFROM public.ecr.aws/lambda/microvms:al2023-minimal\n"
            "RUN dnf install -y nodejs npm shadow-utils && useradd -m node\nENV NODE_ENV production\n\nWORKDIR /usr/src/app\n\n"
            "RUN --mount=type=bind,source=package.json,target=package.json \\\n    --mount=type=cache,target=/root/.npm \\\n    npm install --omit=dev\n\n"
            "USER node\n\nCOPY . .\n\nEXPOSE 3000\n\nCMD node server.js\n",
            [
                Get("answers as its user", port=3000, contains="hits 1 for node$", within=120),
                Sleep(),
                Get("its memory is as before the sleep", port=3000, contains="hits 2 for node$", within=60),
            ],
            {
                "package.json": _package(express="4"),
                "server.js": EXPRESS.replace("${++hits}", "${++hits} for ${require('os').userInfo().username}"),
                ".dockerignore": "**/node_modules\n",
            },
            long=True,
        ),
        Image(
            "node-plain",
            "a server of Node's own http module, by npm start",
            NODE + 'WORKDIR /app\nCOPY . .\nEXPOSE 3000\nCMD ["npm", "start"]\n',
            COUNTS,
            {"package.json": '{"name": "app", "scripts": {"start": "node server.js"}}\n', "server.js": SERVER},
            long=True,
        ),
        Image(
            "express-multistage",
            "dependencies in one stage, the application in the next",
            "FROM public.ecr.aws/lambda/microvms:al2023-minimal AS base\nRUN dnf install -y nodejs npm\nFROM base AS Deps\nWORKDIR /app\nCOPY package*.json ./\n"
            "RUN npm install\nFROM base AS runner\nWORKDIR /app\nCOPY --from=deps /app/node_modules ./node_modules\nCOPY . .\nEXPOSE 3000\n"
            'ENTRYPOINT ["node"]\nCMD ["server.js"]\n',
            COUNTS,
            {"package.json": _package(express="4"), "server.js": EXPRESS},
            long=True,
        ),
        Image(
            "pnpm",
            "pnpm with its store in a cache mount",
            NODE + "RUN npm install -g pnpm@9\nENV PNPM_HOME=/pnpm\nWORKDIR /app\nCOPY . .\n"
            'RUN --mount=type=cache,id=pnpm,target=/pnpm/store pnpm install --prod\nEXPOSE 3000\nCMD ["node", "server.js"]\n',
            COUNTS,
            {"package.json": _package(express="4"), "server.js": EXPRESS},
            long=True,
        ),
        Image(
            "yarn",
            "Yarn classic",
            NODE
            + 'RUN npm install -g yarn@1\nWORKDIR /app\nCOPY package.json ./\nRUN yarn install --production\nCOPY . .\nEXPOSE 3000\nCMD ["yarn", "start"]\n',
            COUNTS,
            {"package.json": _package(', "scripts": {"start": "node server.js"}', express="4"), "server.js": EXPRESS},
            long=True,
        ),
        Image(
            "fastify",
            "Fastify, listening on ::",
            NODE + 'WORKDIR /app\nRUN npm init -y && npm install fastify@4\nCOPY server.js .\nEXPOSE 3000\nCMD ["node", "server.js"]\n',
            COUNTS,
            {
                "server.js": "let hits = 0;\nconst f = require('fastify')();\nf.get('/', async () => `hits ${++hits}`);\nf.listen({port: 3000, host: '::'});\n"
            },
            long=True,
        ),
        Image(
            "socket-io",
            "Express with socket.io",
            NODE
            + 'WORKDIR /app\nRUN npm init -y && npm install express@4 socket.io@4\nCOPY server.js .\nEXPOSE 3000\nCMD ["node", "server.js"]\n',
            [
                Get(
                    "a session by long polling",
                    "/socket.io/?EIO=4&transport=polling",
                    3000,
                    contains='"upgrades":\\["websocket"\\]',
                    within=120,
                ),
                Sleep(),
                Get("and after a sleep", "/socket.io/?EIO=4&transport=polling", 3000, contains="sid", within=60),
            ],
            {
                "server.js": "const s = require('http').createServer(require('express')());\nnew (require('socket.io').Server)(s);\ns.listen(3000);\n"
            },
            long=True,
        ),
        Image(
            "typescript",
            "TypeScript, compiled in the build",
            NODE + 'WORKDIR /app\nCOPY . .\nRUN npm install && npx tsc\nEXPOSE 3000\nCMD ["node", "dist/server.js"]\n',
            COUNTS,
            {
                "package.json": _package(typescript="5", **{"@types/node": "20"}),
                "tsconfig.json": '{"compilerOptions": {"outDir": "dist", "module": "commonjs", "target": "es2020", "strict": true, "types": ["node"]}, "include": ["server.ts"]}\n',
                "server.ts": "import * as http from 'http';\nlet hits: number = 0;\nhttp.createServer((_, r) => { r.end(`hits ${++hits}`); }).listen(3000);\n",
            },
            long=True,
        ),
        Image(
            "vite-dev",
            "Vite's development server with its defaults: it listens on localhost",
            NODE + 'WORKDIR /app\nRUN npm init -y && npm install vite@5\nCOPY . .\nEXPOSE 5173\nCMD ["npx", "vite"]\n',
            [
                Get("its client is served", "/@vite/client", 5173, contains="HMR|hmr", within=180),
                Sleep(),
                Get("and after a sleep", "/@vite/client", 5173, within=60),
            ],
            {"index.html": "<h1>hello</h1><script type=module src=/main.js></script>\n", "main.js": "console.log(1)\n"},
            long=True,
        ),
        Image(
            "vite-nginx",
            "a page built by Vite, served by nginx",
            "FROM public.ecr.aws/lambda/microvms:al2023-minimal AS build\nRUN dnf install -y nodejs npm\nWORKDIR /app\nRUN npm init -y && npm install vite@5\nCOPY . .\n"
            "RUN npx vite build\n" + BASE + "RUN dnf install -y nginx\nCOPY --from=build /app/dist /usr/share/nginx/html\n"
            "COPY <<END /etc/nginx/nginx.conf\nevents {}\nhttp { include mime.types; server { listen 8080; root /usr/share/nginx/html; } }\nEND\n"
            'EXPOSE 8080\nCMD ["nginx", "-g", "daemon off;"]\n',
            [Get("serves the built page", contains="assets/index-", within=60)],
            {"index.html": "<h1>hello</h1><script type=module src=/main.js></script>\n", "main.js": "console.log('built')\n"},
            long=True,
        ),
        Image(
            "next-standalone",
            "Next.js, output standalone",
            "FROM public.ecr.aws/lambda/microvms:al2023-minimal AS base\nRUN dnf install -y nodejs npm\nFROM base AS builder\nWORKDIR /app\nCOPY . .\n"
            "ENV NEXT_TELEMETRY_DISABLED=1\nRUN npm install && npm run build\nFROM base AS runner\nWORKDIR /app\nENV NODE_ENV=production HOSTNAME=0.0.0.0 PORT=3000\n"
            "RUN groupadd --system --gid 1001 nodejs && useradd --system --uid 1001 --gid 1001 nextjs\n"
            "COPY --from=builder --chown=nextjs:nodejs /app/.next/standalone ./\nCOPY --from=builder --chown=nextjs:nodejs /app/.next/static ./.next/static\n"
            'USER nextjs\nEXPOSE 3000\nCMD ["node", "server.js"]\n',
            [
                Get("renders its page", port=3000, contains="hello from next", within=240),
                Sleep(),
                Get("and after a sleep", port=3000, contains="hello from next", within=60),
            ],
            {
                "package.json": _package(', "scripts": {"build": "next build"}', next="14", react="18", react_dom="18"),
                "next.config.js": "module.exports = {output: 'standalone'};\n",
                "app/layout.js": "export default ({children}) => <html><body>{children}</body></html>;\n",
                "app/page.js": "export default () => <p>hello from next</p>;\n",
            },
            long=True,
            request={"resources": [{"minimumMemoryInMiB": 1024}]},
        ),
        Image(
            "pm2",
            "pm2-runtime as the entry point",
            NODE + 'WORKDIR /app\nRUN npm install -g pm2@5\nCOPY server.js .\nEXPOSE 3000\nCMD ["pm2-runtime", "server.js"]\n',
            COUNTS,
            {"server.js": SERVER},
            long=True,
        ),
        Image(
            "bun",
            "Bun, from the npm registry",
            NODE + 'WORKDIR /app\nRUN npm install -g bun\nCOPY server.ts .\nEXPOSE 3000\nCMD ["bun", "run", "server.ts"]\n',
            COUNTS,
            {"server.ts": "let hits = 0;\nBun.serve({port: 3000, fetch: () => new Response(`hits ${++hits}`)});\n"},
            long=True,
        ),
        Image(
            "code-server",
            "code-server (VS Code in a browser)",
            BASE + "RUN dnf install -y nodejs24 nodejs24-npm gcc gcc-c++ make python3 libsecret-devel krb5-devel git shadow-utils\n"
            "RUN npm install -g code-server@4.139.1 --unsafe-perm\n"
            "RUN sed -i 's/timeoutInterval = 10000;/timeoutInterval = 300000;/' $(npm root -g)/code-server/out/node/wrapper.js\n"
            "RUN useradd -m coder\nUSER coder\nWORKDIR /home/coder\nEXPOSE 8080\n"
            'CMD ["code-server", "--bind-addr", "0.0.0.0:8080", "--auth", "none"]\n',
            [
                Get("is healthy", "/healthz", contains="status", within=240),
                Sleep(),
                Get("and after a sleep", "/healthz", contains="status", within=60),
            ],
            note="it gives its own second process ten seconds to start (`timeoutInterval` in out/node/wrapper.js), too few for a busy emulated processor",
            long=True,
            request={"resources": [{"minimumMemoryInMiB": 1024}]},
            times=1200,
        ),
    ],
    corpus=True,
)
