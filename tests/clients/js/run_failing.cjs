// Runs one edit a name, all at once, each with the name as its prompt, and prints how each failed.
// Usage: node run_failing.cjs http://box/api/fal/proxy NAME...
const [, , proxyUrl, ...names] = process.argv;
const { fal } = require("@fal-ai/client");

async function failure(name) {
  try {
    await fal.run("fal-ai/flux-kontext-lora", { input: { prompt: name } });
    return [name, null];
  } catch (error) {
    return [name, { name: error.name, status: error.status, requestId: error.requestId, body: error.body ?? null }];
  }
}

fal.config({ credentials: "id:secret", proxyUrl: { url: proxyUrl, when: "always" } });
Promise.all(names.map(failure)).then((told) => console.log(JSON.stringify(Object.fromEntries(told))));
