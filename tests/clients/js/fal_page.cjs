// The calls that fal's page of this endpoint shows, in its own form, with the one line of configuration before them where
// the names do not lead here; prints what each gave, as JSON.
// Usage: node fal_page.cjs '{"config": {…} or null, "input": {…}, "webhookUrl": URL or null}'
const { File } = require("node:buffer"); // a global of its own only from Node 20 on
const { fal } = require("@fal-ai/client");
const { config, input, webhookUrl } = JSON.parse(process.argv[2]);

if (config) fal.config(config);

async function subscribed() {
  const lines = [];
  const result = await fal.subscribe("fal-ai/flux-kontext-lora", {
    input,
    logs: true,
    onQueueUpdate: (update) => {
      if (update.status === "IN_PROGRESS") {
        update.logs.map((log) => log.message).forEach((line) => lines.push(line));
      }
    },
  });
  return { data: result.data, requestId: result.requestId, lines };
}

async function streamed() {
  const events = [];
  const stream = await fal.stream("fal-ai/flux-kontext-lora", { input });
  for await (const event of stream) {
    events.push(event);
  }
  const result = await stream.done();
  return { events, result };
}

async function queued() {
  const { request_id } = await fal.queue.submit("fal-ai/flux-kontext-lora", { input, webhookUrl: webhookUrl ?? undefined });
  let status;
  do {
    status = await fal.queue.status("fal-ai/flux-kontext-lora", { requestId: request_id, logs: true });
  } while (status.status !== "COMPLETED");
  const result = await fal.queue.result("fal-ai/flux-kontext-lora", { requestId: request_id });
  return { request_id, status, data: result.data, requestId: result.requestId };
}

async function uploaded() {
  const file = new File(["Hello, World!"], "hello.txt", { type: "text/plain" });
  const url = await fal.storage.upload(file);
  const read = await fetch(url);
  return { url, text: await read.text(), type: read.headers.get("content-type") };
}

async function page() {
  return { subscribed: await subscribed(), streamed: await streamed(), queued: await queued(), uploaded: await uploaded() };
}

page().then((told) => console.log(JSON.stringify(told)));
