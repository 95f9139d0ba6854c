// A js-libp2p peer that does what it is told: one JSON object a line in, one a line out.
// Speaks TCP; WebSocket with the argument /ws.

import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { webSockets } from '@libp2p/websockets'
import { yamux } from '@libp2p/yamux'
import { createLibp2p } from 'libp2p'
import { multiaddr } from '@multiformats/multiaddr'

const ECHO = '/interop/echo/1'
const TOPIC = '/pinaivu/interop/1'
const tell = (facts) => process.stdout.write(JSON.stringify(facts) + '\n')

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0' + process.argv.slice(2).join('')] },
  transports: [tcp(), webSockets()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    ping: ping(),
    gossip: gossipsub({ allowPublishToZeroTopicPeers: true })
  }
})

async function sendAll (stream, data) {
  for (let at = 0; at < data.length; at += 32768) {
    if (!stream.send(data.subarray(at, at + 32768))) await stream.onDrain()
  }
}

await node.handle(ECHO, async (stream) => {
  for await (const data of stream) {
    if (!stream.send(data)) await stream.onDrain()
  }
  await stream.close()
})

node.services.gossip.addEventListener('message', ({ detail }) => {
  if (detail.topic === TOPIC) tell({ heard: new TextDecoder().decode(detail.data) })
})
node.services.gossip.subscribe(TOPIC)

let met
const meeting = new Promise((resolve) => { met = resolve })
node.addEventListener('peer:disconnect', ({ detail }) => tell({ lost: detail.toString() }))

const orders = {
  async dial ({ address }) {
    const connection = await node.dial(multiaddr(address))
    return { dialled: connection.remotePeer.toString() }
  },
  async echo ({ size }) {
    const stream = await node.dialProtocol(await meeting, ECHO)
    const data = new Uint8Array(size).map((_, at) => (at * 7 + (at >> 8)) & 0xff)
    const back = new Uint8Array(size)
    let got = 0
    const reading = (async () => {
      for await (const piece of stream) {
        const bytes = piece.subarray()
        back.set(bytes, got)
        got += bytes.length
      }
    })()
    await sendAll(stream, data)
    await stream.close()
    await reading
    return { echoed: got, same: Buffer.compare(data, back) === 0 }
  },
  async ping () {
    return { milliseconds: await node.services.ping.ping(await meeting) }
  },
  async identify () {
    const known = await node.peerStore.get(await meeting).catch(() => ({ protocols: [] }))
    return { protocols: known.protocols }
  },
  async publish ({ text }) {
    await node.services.gossip.publish(TOPIC, new TextEncoder().encode(text))
    return { published: text }
  }
}

node.addEventListener('peer:connect', ({ detail }) => met(detail))
tell({ address: node.getMultiaddrs()[0].toString() })
for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line)
  orders[order.do](order).then((facts) => tell({ answer: order.id, ...facts }),
    (error) => tell({ answer: order.id, error: `${error.stack}` }))
}
process.exit(0)
