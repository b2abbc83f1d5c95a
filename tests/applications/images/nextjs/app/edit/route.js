import { writeFileSync } from 'node:fs';

export const dynamic = 'force-dynamic';

// What an editor in the microVM does.
export function GET(request) {
  writeFileSync('/app/app/text.js', `export const text = '${new URL(request.url).searchParams.get('words')}';\n`);
  return new Response('written');
}
