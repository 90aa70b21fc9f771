// Streams one edit a prompt through a proxyUrl, all at once, and prints of each, as JSON by prompt: the events, and
// whether done() resolved or rejected.
// Usage: node stream.cjs http://box/api/fal/proxy PROMPT...
const [, , proxyUrl, ...prompts] = process.argv;
const { fal } = require("@fal-ai/client");

async function streamed(prompt) {
  const events = [];
  const stream = await fal.stream("fal-ai/flux-kontext-lora", { input: { prompt, image_url: "x" } });
  stream.on("data", (event) => events.push(event));
  stream.on("error", () => {}); // done() reports it
  try {
    const resolved = await stream.done();
    return [prompt, { events, resolved, requestId: stream.requestId }];
  } catch (error) {
    return [prompt, { events, rejected: error.name, status: error.status, body: error.body ?? null }];
  }
}

fal.config({ credentials: "id:secret", proxyUrl: { url: proxyUrl, when: "always" } });
Promise.all(prompts.map(streamed)).then((told) => console.log(JSON.stringify(Object.fromEntries(told))));
