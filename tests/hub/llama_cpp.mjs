// What llama.cpp makes of texts: their ids, and the most likely tokens that follow.
// Arguments: the folder with node-llama-cpp, what is asked as JSON, and where the answers go.
// Asked is a list of {file, lora, texts, count, size}: a GGUF file, perhaps an adapter's, texts (or ids), how many tokens are to
// follow, and the size of the context.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [place, asked, out] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(path.join(place, "node_modules/node-llama-cpp/dist/index.js")));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: "error"});

async function answers({file, lora, texts, count = 12, size = 256}) {
    const model = await llama.loadModel({modelPath: file});
    const cache = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
    const context = await model.createContext({contextSize: size, flashAttention: false, ...cache, ...(lora ? {lora} : {})});
    const sequence = context.getSequence();
    const begin = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    const found = [];
    for (const text of texts) {
        const ids = Array.isArray(text) ? text : [...begin, ...model.tokenize(text, true)];
        const next = [];
        await sequence.clearHistory();
        if (count) {
            for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
                if (next.push(token) === count) break;
            }
        }
        found.push({ids, next});
    }
    const ends = [...model.iterateAllTokens()].filter((token) => model.isEogToken(token));
    await context.dispose();
    await model.dispose();
    return {found, ends, template: model.fileInfo.metadata.tokenizer?.chat_template ?? null};
}

const told = [];
for (const one of JSON.parse(fs.readFileSync(asked, "utf8"))) {
    try {
        told.push(await answers(one));
    } catch (error) {
        told.push({error: String(error?.message ?? error)});
    }
}
fs.writeFileSync(out, JSON.stringify(told));
process.exit(0);
