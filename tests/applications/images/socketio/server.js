const app = require('express')();
const server = require('http').createServer(app);
const io = new (require('socket.io').Server)(server, {
  pingInterval: 10000, pingTimeout: 5000, connectionStateRecovery: { maxDisconnectionDuration: 120000 },
});
let total = 0, sessions = 0;
io.on('connection', (socket) => {
  if (!socket.recovered) sessions++;
  socket.on('add', (number, answer) => answer(total += number));
});
app.get('/', (request, response) => response.json({ total, sessions, connected: io.engine.clientsCount }));
server.listen(3000);
