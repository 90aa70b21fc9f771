// Runs edits that fail, one after the other, and prints how each did, as JSON: what a run posts is counted elsewhere.
// Usage: node failing_runs.cjs '{"config": {…}, "input": {…}, "endless": {…}}'
const { fal } = require("@fal-ai/client");
const { failure } = require("./failure.cjs");
const { config, input, endless } = JSON.parse(process.argv[2]);

const ENDPOINT = "fal-ai/flux-kontext-lora";
fal.config(config);

async function failing() {
  const invalid = await failure(() => fal.run(ENDPOINT, { input: { prompt: "no picture" } }));
  const unloadable = await failure(() => fal.run(ENDPOINT, { input: { ...input, image_url: "data:image/png;base64,AAAA" } }));
  const { request_id: requestId } = await fal.queue.submit(ENDPOINT, { input: endless });
  while ((await fal.queue.status(ENDPOINT, { requestId })).status === "IN_QUEUE");
  const late = await failure(() => fal.run(ENDPOINT, { input, startTimeout: 1.1 }));
  await fal.queue.cancel(ENDPOINT, { requestId });
  while ((await fal.queue.status(ENDPOINT, { requestId })).status !== "COMPLETED");
  return { statuses: [invalid.status, unloadable.status, late.status], timed_out_by_user: late.isUserTimeout };
}

failing().then((told) => console.log(JSON.stringify(told)));
