// Prints the digest of the WebAssembly module that is named.
import { readFile } from "node:fs/promises";

const { instance } = await WebAssembly.instantiate(await readFile(process.argv[2]));
console.log(BigInt.asUintN(64, instance.exports.digest()).toString(16).padStart(16, "0"));
