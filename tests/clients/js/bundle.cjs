// Makes one script of a page's script and the clients it imports, as a studio's build does.
// Usage: node bundle.cjs SOURCE TARGET
const { buildSync } = require("esbuild");
const [, , source, outfile] = process.argv;

const { errors } = buildSync({
  entryPoints: [source],
  bundle: true,
  outfile,
  nodePaths: [process.env.NODE_PATH],
  logLevel: "error",
});
console.log(JSON.stringify({ errors }));
