// An EventSource as pages have it: it says what it sees, a line of JSON each, and is left to connect again by itself.
import { EventSource } from 'eventsource';

const [url, fields] = [process.argv[2], JSON.parse(process.argv[3])];
const say = (what) => console.log(JSON.stringify(what));
const source = new EventSource(url, { fetch: (input, init) => fetch(input, { ...init, headers: { ...init.headers, ...fields } }) });
source.onopen = () => say({ open: true });
source.onerror = (event) => say({ error: String(event.message ?? event.code ?? 'ended') });
source.onmessage = (event) => say({ id: Number(event.lastEventId), data: event.data });
process.stdin.resume(); // a timer of EventSource's keeps no process alive
