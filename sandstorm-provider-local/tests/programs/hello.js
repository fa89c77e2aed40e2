const line = require("fs").readFileSync(0, "utf8").trim();
console.log("hello", line, process.argv.slice(2).join(","));
console.error("warned");
process.exitCode = 3;
