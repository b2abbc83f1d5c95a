import { writeFileSync } from 'node:fs';

// What an editor in the microVM does: /edit/WORDS changes a source file.
const editor = {
  name: 'editor',
  configureServer(server) {
    server.middlewares.use('/edit/', (request, response) => {
      writeFileSync('/app/text.js', `export const text = '${decodeURIComponent(request.url.slice(1))}';\n`);
      response.end('written');
    });
  },
};
export default { plugins: [editor] };
