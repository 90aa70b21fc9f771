// What the JavaScript client can do besides the calls of fal's page, and how it fails; prints what each gave, as JSON.
// Usage: node every_call.cjs '{"config": {…} or null, "input": {…}, "endless": {…}, "photo": FILE, "bytes": N}'; "endless"
// is an input that takes minutes, "bytes" the size of a large upload. Without a config it streams by a token, too: such a
// stream goes to fal.run whatever is configured.
const { readFileSync } = require("node:fs");
const { createHash, randomBytes } = require("node:crypto");
const { fal, createFalClient, ApiError, ValidationError } = require("@fal-ai/client");
const { failure } = require("./failure.cjs");
const { config, input, endless, photo, bytes } = JSON.parse(process.argv[2]);

const ENDPOINT = "fal-ai/flux-kontext-lora";
const kinds = { ApiError, ValidationError };
if (config) fal.config(config);

const sha256 = (data) => createHash("sha256").update(data).digest("hex");

async function followed() {
  const { request_id: requestId } = await fal.queue.submit(ENDPOINT, { input, priority: "low", hint: "tests" });
  const states = [], lines = [];
  const stream = await fal.queue.streamStatus(ENDPOINT, { requestId, logs: true });
  stream.on("data", (status) => {
    states.push(status.status);
    (status.logs ?? []).forEach((log) => lines.push(log.message));
  });
  await stream.done();
  const subscribed = await fal.subscribe(ENDPOINT, { input, mode: "streaming", logs: true });
  return { requestId, states, lines, subscribed };
}

async function uploaded() {
  const blob = new Blob([readFileSync(photo)], { type: "image/png" });
  const large = randomBytes(bytes);
  const url = await fal.storage.upload(new Blob([large], { type: "application/octet-stream" }));
  const read = Buffer.from(await (await fetch(url)).arrayBuffer());
  const edited = await fal.run(ENDPOINT, { input: { ...input, image_url: blob } });
  return { url, same: sha256(read) === sha256(large), edited };
}

async function busy() {
  const { request_id: requestId } = await fal.queue.submit(ENDPOINT, { input: endless });
  while ((await fal.queue.status(ENDPOINT, { requestId })).status === "IN_QUEUE");
  return requestId;
}

async function completed(requestId) {
  for (;;) {
    const status = await fal.queue.status(ENDPOINT, { requestId });
    if (status.status === "COMPLETED") return status;
  }
}

async function interrupted() {
  const requestId = await busy();
  const late = await failure(() => fal.run(ENDPOINT, { input, startTimeout: 1.1 }), kinds);
  await fal.queue.cancel(ENDPOINT, { requestId });
  const cancelled = await completed(requestId);
  const result = await failure(() => fal.queue.result(ENDPOINT, { requestId }), kinds);
  let given;
  const onEnqueue = (id) => (given = id);
  const impatient = await failure(() => fal.subscribe(ENDPOINT, { input: endless, timeout: 1500, onEnqueue }), kinds);
  return { late, cancelled, result, impatient, given_up: await completed(given) };
}

async function refused() {
  const stranger = createFalClient({ ...config, credentials: "nobody:0123456789abcdef" });
  const requestId = "00000000-0000-0000-0000-000000000000";
  return {
    invalid: await failure(() => fal.run(ENDPOINT, { input: { prompt: "no picture" } }), kinds),
    unloadable: await failure(() => fal.subscribe(ENDPOINT, { input: { ...input, image_url: "data:image/png;base64,AAAA" } }), kinds),
    unknown: await failure(() => fal.queue.result(ENDPOINT, { requestId }), kinds),
    stranger: await failure(() => stranger.run(ENDPOINT, { input }), kinds),
  };
}

async function direct() {
  const stream = await fal.stream(ENDPOINT, { input, connectionMode: "client" });
  return await stream.done();
}

async function all() {
  return {
    followed: await followed(),
    uploaded: await uploaded(),
    interrupted: await interrupted(),
    refused: await refused(),
    direct: config ? null : await direct(),
  };
}

all().then((told) => console.log(JSON.stringify(told)));
