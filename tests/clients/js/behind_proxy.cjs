// A studio's own proxy, @fal-ai/server-proxy, in front: in Hono for every call, in Express for subscribe and a small
// upload (it makes a 200 of every status). Has to run where fal's names lead here, with FAL_KEY for the proxy; the client
// has no key. Prints what each gave, as JSON. Usage: node behind_proxy.cjs '{"input": {…}, "photo": FILE, "bytes": N}'
const { readFileSync } = require("node:fs");
const express = require("express");
const { serve } = require("@hono/node-server");
const { Hono } = require("hono");
const { DEFAULT_ALLOWED_URL_PATTERNS } = require("@fal-ai/server-proxy");
const expressProxy = require("@fal-ai/server-proxy/express");
const { createRouteHandler } = require("@fal-ai/server-proxy/hono");
const { createFalClient, ApiError, ValidationError } = require("@fal-ai/client");
const { failure } = require("./failure.cjs");
const { input, photo, bytes } = JSON.parse(process.argv[2]);

const ENDPOINT = "fal-ai/flux-kontext-lora";
const kinds = { ApiError, ValidationError };
const allowed = { allowedEndpoints: [`${ENDPOINT}{,/**}`], allowUnauthorizedRequests: true };

function hono() {
  const allowedUrlPatterns = [...DEFAULT_ALLOWED_URL_PATTERNS, "rest.fal.ai/**"];
  const app = new Hono().all("/api/fal/proxy", createRouteHandler({ ...allowed, allowedUrlPatterns }));
  return new Promise((resolve) => {
    const server = serve({ fetch: app.fetch, hostname: "127.0.0.1", port: 0 }, ({ port }) => resolve({ server, port }));
  });
}

function inExpress() {
  const app = express().use(express.json()).all(expressProxy.route, expressProxy.createHandler(allowed));
  return new Promise((resolve) => {
    const server = app.listen(0, "127.0.0.1", () => resolve({ server, port: server.address().port }));
  });
}

function client({ port }) {
  const url = `http://127.0.0.1:${port}/api/fal/proxy`;
  return createFalClient({ credentials: undefined, proxyUrl: { url, when: "always" } });
}

async function subscribed(fal) {
  const lines = [];
  const onQueueUpdate = (update) => {
    if (update.status === "IN_PROGRESS") update.logs.map((log) => log.message).forEach((line) => lines.push(line));
  };
  return { ...(await fal.subscribe(ENDPOINT, { input, logs: true, onQueueUpdate })), lines };
}

async function uploaded(fal, data) {
  const url = await fal.storage.upload(new Blob([data], { type: "image/png" }));
  return { url, same: Buffer.from(await (await fetch(url)).arrayBuffer()).equals(Buffer.from(data)) };
}

async function streamed(fal) {
  const events = [];
  const stream = await fal.stream(ENDPOINT, { input });
  for await (const event of stream) events.push(event);
  return { events, result: await stream.done() };
}

async function all() {
  const [first, second] = [await hono(), await inExpress()];
  const [fal, small] = [client(first), client(second)];
  const requestId = "00000000-0000-0000-0000-000000000000";
  const told = {
    hono: {
      subscribed: await subscribed(fal),
      streamed: await streamed(fal),
      uploaded: await uploaded(fal, readFileSync(photo)),
      large: await uploaded(fal, new Uint8Array(bytes).fill(7)),
      edited: await fal.run(ENDPOINT, { input: { ...input, image_url: new Blob([readFileSync(photo)], { type: "image/png" }) } }),
      invalid: await failure(() => fal.run(ENDPOINT, { input: { prompt: "no picture" } }), kinds),
      unknown: await failure(() => fal.queue.result(ENDPOINT, { requestId }), kinds),
    },
    express: { subscribed: await subscribed(small), uploaded: await uploaded(small, readFileSync(photo)) },
  };
  first.server.close();
  second.server.close();
  return told;
}

all().then((told) => {
  // Connections are kept alive, so it has to end by itself, but not before the last of it is written.
  process.stdout.write(`${JSON.stringify(told)}\n`, () => process.exit(0));
});
