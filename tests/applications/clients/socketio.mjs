// A socket.io client with its defaults: adds what it is told on standard input, and says what comes of it.
import { createInterface } from 'node:readline';
import { io } from 'socket.io-client';

const [url, fields] = [process.argv[2], JSON.parse(process.argv[3])];
const say = (what) => console.log(JSON.stringify(what));
const socket = io(url, { extraHeaders: fields });
socket.on('connect', () => say({ connect: socket.id, transport: socket.io.engine.transport.name, recovered: socket.recovered }));
socket.io.engine?.on('upgrade', (transport) => say({ upgrade: transport.name }));
socket.on('disconnect', (reason) => say({ disconnect: reason }));
socket.on('connect_error', (error) => say({ refused: error.message }));
createInterface({ input: process.stdin }).on('line', (line) => socket.emit('add', Number(line), (total) => say({ total, id: socket.id })));
