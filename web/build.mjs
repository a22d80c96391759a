// Builds the page: `node build.mjs OPENAPI.json INTO`. The types of the API are made from the server's own document.
// INTO is replaced in one rename, so that a server that starts meanwhile finds a whole page.
import { promises as fs } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import zlib from "node:zlib";
import openapiTS, { astToString } from "openapi-typescript";
import { build } from "vite";

const here = path.dirname(fileURLToPath(import.meta.url));
const [documentPath, into] = process.argv.slice(2);
const typesPath = path.join(here, "src/api/schema.d.ts");
const compressible = /\.(css|html|js|json|svg)$/;
const gzip = promisify(zlib.gzip);
const brotli = promisify(zlib.brotliCompress);

async function writeTypes() {
  const document = JSON.parse(await fs.readFile(documentPath, "utf8"));
  const text = "// Made by build.mjs from the server's OpenAPI document.\n" + astToString(await openapiTS(document, { defaultNonNullable: false }));
  if ((await fs.readFile(typesPath, "utf8").catch(() => "")) !== text) await fs.writeFile(typesPath, text);
}

async function compress(directory) {
  const entries = await fs.readdir(directory, { recursive: true, withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile() && compressible.test(entry.name));
  await Promise.all(
    files.map(async (entry) => {
      const file = path.join(entry.parentPath ?? entry.path, entry.name);
      const bytes = await fs.readFile(file);
      const packed = [
        [".gz", await gzip(bytes, { level: 9 })],
        [".br", await brotli(bytes, { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 10 } })],
      ];
      for (const [ending, smaller] of packed) {
        if (smaller.length < bytes.length) await fs.writeFile(file + ending, smaller);
      }
    }),
  );
}

await writeTypes();
if (into) {
  const unfinished = `${into}.new`;
  await fs.rm(unfinished, { recursive: true, force: true });
  await build({
    root: here,
    configFile: false,
    logLevel: "warn",
    esbuild: { jsx: "automatic", legalComments: "none" },
    build: {
      outDir: unfinished,
      emptyOutDir: true,
      target: "es2022",
      assetsInlineLimit: 0, // the page's policy forbids most of what would be inlined
      modulePreload: { polyfill: false },
      manifest: "manifest.json",
      reportCompressedSize: false,
    },
  });
  await compress(unfinished);
  await fs.rm(into, { recursive: true, force: true });
  await fs.rename(unfinished, into);
}
