// Every call that the JavaScript client has for this endpoint, through a proxyUrl, and what each gave, as JSON.
// Usage: node journey.cjs http://box/api/fal/proxy KEY [BYTES]; with BYTES it only uploads so many and reads them back.
const [, , proxyUrl, key, bytes] = process.argv;
const { fal, ApiError, ValidationError } = require("@fal-ai/client");

const ENDPOINT = "fal-ai/flux-kontext-lora";
const input = { image_url: "https://studio.example/cat.png", prompt: "paint it red", seed: 7 };

async function subscribed() {
  const lines = [], states = [];
  const result = await fal.subscribe(ENDPOINT, {
    input,
    logs: true,
    pollInterval: 20,
    onQueueUpdate: (update) => {
      states.push(update.status);
      if (update.status === "IN_PROGRESS") update.logs.map((log) => log.message).forEach((line) => lines.push(line));
    },
  });
  return { result, lines, states };
}

async function queued() {
  const { request_id: requestId, queue_position } = await fal.queue.submit(ENDPOINT, { input, priority: "low" });
  const seen = [];
  const stream = await fal.queue.streamStatus(ENDPOINT, { requestId, logs: true });
  stream.on("data", (status) => seen.push(status.status));
  await stream.done();
  const status = await fal.queue.status(ENDPOINT, { requestId, logs: true });
  return { requestId, queue_position, seen, status, result: await fal.queue.result(ENDPOINT, { requestId }) };
}

async function cancelled() {
  const { request_id: requestId } = await fal.queue.submit(ENDPOINT, { input: { ...input, prompt: "wait" } });
  await fal.queue.cancel(ENDPOINT, { requestId });
  for (;;) {
    const status = await fal.queue.status(ENDPOINT, { requestId });
    if (status.status === "COMPLETED") return status;
  }
}

async function streamed() {
  const events = [];
  const stream = await fal.stream(ENDPOINT, { input });
  for await (const event of stream) events.push(event);
  return { events, result: await stream.done() };
}

async function uploaded(size) {
  const blob = new Blob([new Uint8Array(size).fill(7)], { type: "image/png" });
  const url = await fal.storage.upload(blob);
  const read = await (await fetch(url)).arrayBuffer();
  return { url, size: read.byteLength, last: new Uint8Array(read)[size - 1] };
}

async function failure(call) {
  try {
    await call();
  } catch (error) {
    return { name: error.name, status: error.status, isValidation: error instanceof ValidationError,
      isApi: error instanceof ApiError, requestId: error.requestId };
  }
}

async function journey() {
  return {
    ran: await fal.run(ENDPOINT, { input }),
    subscribed: await subscribed(),
    queued: await queued(),
    cancelled: await cancelled(),
    streamed: await streamed(),
    uploaded: await uploaded(1000),
    transformed: await fal.run(ENDPOINT, { input: { ...input, image_url: new Blob(["abc"], { type: "image/png" }) } }),
    wrong: await failure(() => fal.run(ENDPOINT, { input: { prompt: "x" } })),
    unknown: await failure(() => fal.queue.result(ENDPOINT, { requestId: "00000000-0000-0000-0000-000000000000" })),
  };
}

fal.config({ credentials: key, proxyUrl: { url: proxyUrl, when: "always" } });
(bytes ? uploaded(Number(bytes)) : journey()).then((told) => console.log(JSON.stringify(told)));
