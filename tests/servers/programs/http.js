// node's http on a listener that it was handed.  Usage: http.js FD READY-FD
const wait = 1000 * Number(process.env.WAIT_S || 0)
const status = Number(require('fs').readFileSync(process.env.RELEASE))
const server = require('http').createServer((request, response) => {
  response.statusCode = status
  setTimeout(() => response.end(`${process.pid}\n`), wait)
})
process.on('SIGTERM', () => server.close())
server.listen({ fd: Number(process.argv[2]) }, () => {
  require('fs').writeSync(Number(process.argv[3]), '\n')
})
