// The deprecated @fal-ai/serverless-client: subscribe, stream and upload, led here by a requestMiddleware; prints what
// each gave, as JSON. Usage: node serverless.cjs '{"url": URL, "key": KEY, "input": {…}, "photo": FILE}'
const { readFileSync } = require("node:fs");
const fal = require("@fal-ai/serverless-client");
const { failure } = require("./failure.cjs");
const { url, key, input, photo } = JSON.parse(process.argv[2]);

const ENDPOINT = "fal-ai/flux-kontext-lora";
const PLACES = { "fal.run": "", "queue.fal.run": "/queue", "rest.alpha.fal.ai": "/rest" };
const asked = new Set();

fal.config({
  credentials: key,
  requestMiddleware: async (request) => {
    const target = new URL(request.url);
    asked.add(target.host);
    return { ...request, url: `${url}${PLACES[target.host]}${target.pathname}${target.search}` };
  },
});

async function streamed() {
  const events = [];
  const stream = await fal.stream(ENDPOINT, { input });
  stream.on("data", (event) => events.push(event));
  return { result: await stream.done(), events };
}

async function all() {
  const lines = [];
  const onQueueUpdate = (update) => {
    if (update.status === "IN_PROGRESS") update.logs.map((log) => log.message).forEach((line) => lines.push(line));
  };
  const blob = new Blob([readFileSync(photo)], { type: "image/png" });
  const uploaded = await fal.storage.upload(blob);
  return {
    subscribed: await fal.subscribe(ENDPOINT, { input, logs: true, onQueueUpdate }),
    lines,
    streamed: await streamed(),
    uploaded,
    same: Buffer.from(await (await fetch(uploaded)).arrayBuffer()).equals(readFileSync(photo)),
    transformed: await fal.run(ENDPOINT, { input: { ...input, image_url: blob } }),
    invalid: await failure(() => fal.run(ENDPOINT, { input: { prompt: "no picture" } })),
    hosts: [...asked].sort(),
  };
}

all().then((told) => console.log(JSON.stringify(told)));
