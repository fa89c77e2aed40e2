import * as fs from "node:fs";
import { createHash } from "crypto";

interface Greeting {
  line: string;
  words: string[];
}

const before: fs.Stats = fs.statSync(".");
const greeting: Greeting = { line: fs.readFileSync(0, "utf8").trim(), words: process.argv.slice(2) };
if (before.isDirectory() && createHash("sha256").update(Buffer.from("a")).digest().length === 32) {
  console.log("hello", greeting.line, greeting.words.join(","));
}
console.error("warned");
process.exitCode = 3;
