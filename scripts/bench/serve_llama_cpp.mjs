// llama.cpp's side of serve.py: all prompts of a round at the same time, each in a sequence of its own.
// Arguments: the folder with node-llama-cpp, what is asked as JSON, and where the figures go.
// Asked is {file, rounds, count, size, threads}: a GGUF file, the ids of the prompts of each round, how many tokens follow each
// prompt, the tokens that a sequence holds, and the threads.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [place, asked, out] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(path.join(place, "node_modules/node-llama-cpp/dist/index.js")));
const {file, rounds, count, size, threads} = JSON.parse(fs.readFileSync(asked, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const cache = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const context = await model.createContext({
    contextSize: size, sequences: rounds[0].length, threads, batchSize: 512, flashAttention: false, ...cache
});
const sequences = rounds[0].map(() => context.getSequence());

async function answer(sequence, ids) {
    const next = [];
    let first;
    // Answers have their full length: with yieldEogToken they go on after a token that ends a text.
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        first ??= performance.now();
        if (next.push(token) === count) break;
    }
    return {next, first};
}

const found = [];
for (const prompts of rounds) {
    for (const sequence of sequences) await sequence.clearHistory();
    const start = performance.now();
    const used = process.cpuUsage();
    const answers = await Promise.all(prompts.map((ids, at) => answer(sequences[at], ids)));
    const seconds = (performance.now() - start) / 1e3;
    const {user, system} = process.cpuUsage(used);
    found.push({
        seconds, used: (user + system) / 1e6, firsts: answers.map(({first}) => (first - start) / 1e3),
        tokens: answers.map(({next}) => next)
    });
}
fs.writeFileSync(out, JSON.stringify(found));
process.exit(0);
