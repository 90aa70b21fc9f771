// Streams an edit through a proxyUrl, cancels it at its first event, and prints how done() ended, as JSON.
// Usage: node breaking_stream.cjs '{"config": {…}, "endless": {…}}'
const { fal, ApiError } = require("@fal-ai/client");
const { failure } = require("./failure.cjs");
const { config, endless } = JSON.parse(process.argv[2]);

const ENDPOINT = "fal-ai/flux-kontext-lora";
fal.config(config);

async function broken() {
  const events = [];
  const stream = await fal.stream(ENDPOINT, { input: endless });
  stream.on("data", async (event) => {
    events.push(event);
    if (events.length === 1) await fal.queue.cancel(ENDPOINT, { requestId: stream.requestId });
  });
  return { ...(await failure(() => stream.done(), { ApiError })), events, streamed: stream.requestId };
}

broken().then((told) => console.log(JSON.stringify(told)));
