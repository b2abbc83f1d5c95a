const crypto = require("crypto");
const { random } = Math; // before it is replaced
const { renew } = require("./renew.js");

const draws = {
    randomUUID: () => crypto.randomUUID(),
    "randomUUID without cache": () => crypto.randomUUID({ disableEntropyCache: true }),
    randomBytes: () => crypto.randomBytes(16).toString("hex"),
    randomInt: () => crypto.randomInt(2 ** 47),
    getRandomValues: () => Buffer.from(crypto.webcrypto.getRandomValues(new Uint8Array(16))).toString("hex"),
    "Math.random": () => Math.random(),
    "Math.random, taken before": () => random(),
    x25519: () => crypto.generateKeyPairSync("x25519").publicKey.export({ type: "spki", format: "der" }).toString("hex"),
};
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
    const made = line === "draw" ? Object.fromEntries(Object.entries(draws).map(([name, draw]) => [name, draw()])) : renew();
    console.log(JSON.stringify(made ?? null));
});
