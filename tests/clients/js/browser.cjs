// Opens pages in a headless Chromium and prints what an expression gives in each, and which requests it made, as JSON.
// Speaks the DevTools protocol through two pipes. Usage: node browser.cjs CHROMIUM PROFILE '[{"page": URL, "run": "…"}]'
const { spawn } = require("node:child_process");
const [, , chromium, profile, list] = process.argv;

const FLAGS = ["--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
  // Root, and some containers, have no sandbox to offer; the pages are ours.
  "--no-sandbox", `--user-data-dir=${profile}`, "--no-proxy-server", "--disable-background-networking"];

class DevTools {
  constructor(browser) {
    this.write = browser.stdio[3];
    this.waiting = new Map();
    this.onEvent = () => {};
    let rest = "";
    browser.stdio[4].setEncoding("utf8").on("data", (data) => {
      const messages = (rest + data).split("\0");
      rest = messages.pop();
      messages.forEach((text) => this.take(JSON.parse(text)));
    });
  }

  take(message) {
    const { resolve, reject } = this.waiting.get(message.id) ?? {};
    if (!resolve) return this.onEvent(message);
    this.waiting.delete(message.id);
    if (message.error) reject(new Error(message.error.message));
    else resolve(message.result);
  }

  call(method, params = {}, sessionId = undefined) {
    const id = ++DevTools.last;
    this.write.write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
  }
}
DevTools.last = 0;

async function visit(tools, { page, run }) {
  const { targetId } = await tools.call("Target.createTarget", { url: "about:blank" });
  const { sessionId } = await tools.call("Target.attachToTarget", { targetId, flatten: true });
  const requests = [], console = [];
  const loaded = new Promise((resolve) => {
    tools.onEvent = ({ method, params }) => {
      if (method === "Page.loadEventFired") resolve();
      if (method === "Runtime.consoleAPICalled") console.push(params.args.map((arg) => arg.value).join(" "));
      if (method === "Network.requestWillBeSent") requests.push(params.request);
    };
  });
  for (const domain of ["Page", "Network", "Runtime"]) await tools.call(`${domain}.enable`, {}, sessionId);
  await tools.call("Page.navigate", { url: page }, sessionId);
  await loaded;
  const asked = { expression: run, awaitPromise: true, returnByValue: true };
  const { result, exceptionDetails } = await tools.call("Runtime.evaluate", asked, sessionId);
  if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
  return { told: result.value, console, requests: requests.map(({ url, method, headers }) => ({ url, method, headers })) };
}

async function main() {
  const browser = spawn(chromium, FLAGS, { stdio: ["ignore", "ignore", "inherit", "pipe", "pipe"] });
  browser.on("exit", (code) => process.exit(code ?? 1)); // before its time: see stderr
  const tools = new DevTools(browser);
  const visits = [];
  for (const one of JSON.parse(list)) visits.push(await visit(tools, one));
  browser.removeAllListeners("exit");
  await Promise.all([new Promise((resolve) => browser.on("exit", resolve)), tools.call("Browser.close")]);
  process.stdout.write(`${JSON.stringify({ visits })}\n`, () => process.exit(0));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
