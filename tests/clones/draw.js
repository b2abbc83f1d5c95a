const crypto = require("crypto");
const { random } = Math; // before it is replaced
const { renew } = require("./renew.js");
const alarm = require("./alarm.js");

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
const fired = new Set();
const commands = {
    draw: () => Object.fromEntries(Object.entries(draws).map(([name, draw]) => [name, draw()])),
    renew,
    woken: alarm.woken,
    fired: () => [...fired].sort(),
    schedule: (when) => {
        setTimeout(() => fired.add("setTimeout"), when * 1000 - Date.now());
        alarm.at(when * 1000, () => fired.add("alarm"));
    },
};
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
    const [command, ...words] = line.split(" ");
    console.log(JSON.stringify(commands[command](...words) ?? null));
});
