// Runs in a page of another origin that has no key, bundled with the clients: `journey(box, hosts)` makes a page's calls
// through the box's proxy and returns what each gave.
import { fal, ApiError } from "@fal-ai/client";
import * as serverless from "@fal-ai/serverless-client";
import { failure } from "./failure.cjs";

const ENDPOINT = "fal-ai/flux-kontext-lora";
const INPUT = { prompt: "make it black and white", seed: 7, num_inference_steps: 8 };

async function subscribed(image_url) {
  const lines = [];
  const onQueueUpdate = (update) => {
    if (update.status === "IN_PROGRESS") update.logs.map((log) => log.message).forEach((line) => lines.push(line));
  };
  return { ...(await fal.subscribe(ENDPOINT, { input: { ...INPUT, image_url }, logs: true, onQueueUpdate })), lines };
}

async function streamed(image_url) {
  const events = [];
  const stream = await fal.stream(ENDPOINT, { input: { ...INPUT, image_url } });
  for await (const event of stream) events.push(event);
  return { events: events.length, result: await stream.done() };
}

window.journey = async function journey(box) {
  const proxyUrl = `${box}/api/fal/proxy`;
  fal.config({ proxyUrl });
  serverless.config({ proxyUrl });
  const photo = await (await fetch("/photo.png")).blob();
  const uploaded = await fal.storage.upload(photo);
  return {
    uploaded,
    same: (await (await fetch(uploaded)).blob()).size === photo.size,
    subscribed: await subscribed(photo),
    streamed: await streamed(uploaded),
    deprecated: await serverless.subscribe(ENDPOINT, { input: { ...INPUT, image_url: uploaded } }),
    invalid: await failure(() => fal.run(ENDPOINT, { input: { prompt: "no picture" } }), { ApiError }),
  };
};

window.refused = async function refused(box) {
  fal.config({ proxyUrl: `${box}/api/fal/proxy`, retry: { maxRetries: 0 } });
  return await failure(() => fal.run(ENDPOINT, { input: { ...INPUT, image_url: "https://studio.example/cat.png" } }), { ApiError });
};
