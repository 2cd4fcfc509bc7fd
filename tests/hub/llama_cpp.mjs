// What llama.cpp makes of texts: their ids, and the twelve most likely tokens that follow.
// Arguments: the folder with node-llama-cpp, a GGUF file, the texts as JSON, and where the answers go.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [place, file, asked, out] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(path.join(place, "node_modules/node-llama-cpp/dist/index.js")));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const sequence = (await model.createContext({contextSize: 256})).getSequence();
const answers = [];
for (const text of JSON.parse(fs.readFileSync(asked, "utf8"))) {
    const begin = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    const ids = [...begin, ...model.tokenize(text)];
    const next = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(ids, {temperature: 0})) {
        if (next.push(token) === 12) break;
    }
    answers.push({ids, next});
}
fs.writeFileSync(out, JSON.stringify(answers));
process.exit(0);
