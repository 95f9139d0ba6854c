// What libp2p 3 asks of node 22, for node 20.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((yes, no) => { resolve = yes; reject = no })
  return { promise, resolve, reject }
}
Promise.try ??= function (action, ...args) {
  return new this((resolve) => resolve(action(...args)))
}
globalThis.WebSocket ??= (await import('ws')).WebSocket
