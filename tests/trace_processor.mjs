// SPDX-License-Identifier: Apache-2.0
// Perfetto's own trace processor, as its web page has it (WebAssembly), without the page: loads a trace and asks it in SQL.
//
//     node trace_processor.mjs FOLDER TRACE < queries        a JSON list of SQL texts
//
// FOLDER has engine_bundle.js and trace_processor.wasm. Prints a JSON list: of each query its rows, as objects. Ends with 1 and the trace
// processor's own words where it refuses the trace or a query.

import fs from "node:fs";
import path from "node:path";
import process from "node:process";
import vm from "node:vm";

const [folder, trace] = process.argv.slice(2);

// -- as much of protocol buffers as perfetto/protos/trace_processor.proto needs

function varint(value) {
    const bytes = [];
    let rest = BigInt(value);
    do {
        bytes.push(Number(rest & 0x7fn) | (rest > 0x7fn ? 0x80 : 0));
        rest >>= 7n;
    } while (rest > 0n);
    return Buffer.from(bytes);
}

const number = (field, value) => Buffer.concat([varint(field << 3), varint(value)]);
const bytes = (field, data) => Buffer.concat([varint((field << 3) | 2), varint(data.length), data]);

function readVarint(data, at) {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
        const byte = data[at++];
        value |= BigInt(byte & 0x7f) << shift;
        if (byte < 0x80) return [value, at];
    }
}

function* fields(data) {
    for (let at = 0; at < data.length; ) {
        let tag, value;
        [tag, at] = readVarint(data, at);
        const kind = Number(tag & 7n);
        if (kind === 0) [value, at] = readVarint(data, at);
        else {
            let size = kind === 1 ? 8n : 4n;
            if (kind === 2) [size, at] = readVarint(data, at);
            value = data.subarray(at, at + Number(size));
            at += Number(size);
        }
        yield [Number(tag >> 3n), value];
    }
}

function* varints(value) {
    if (typeof value === "bigint") return yield value;
    for (let at = 0; at < value.length; ) {
        let one;
        [one, at] = readVarint(value, at);
        yield one;
    }
}

function fail(text) {
    process.stderr.write(text + "\n");
    process.exit(1);
}

process.on("uncaughtException", (error) => fail(String(error))); // without the bundle, which is one line

// -- QueryResult: names of columns, then batches of cells, each kind of cell in a list of its own

class Rows {
    names = [];
    rows = [];
    row = [];

    add(result) {
        for (const [field, value] of fields(result)) {
            if (field === 1) this.names.push(value.toString());
            else if (field === 2 && value.length) fail(value.toString());
            else if (field === 3) this.batch(value);
        }
    }

    batch(data) {
        const kinds = [], integers = [], floats = [];
        let strings = [];
        for (const [field, value] of fields(data)) {
            if (field === 1) kinds.push(...varints(value));
            else if (field === 2) integers.push(...varints(value));
            else if (field === 3) for (let at = 0; at < value.length; at += 8) floats.push(value.readDoubleLE(at));
            else if (field === 5) strings = value.toString().split("\0");
        }
        for (const kind of kinds.map(Number)) {
            let cell = null;
            if (kind === 2) cell = Number(BigInt.asIntN(64, integers.shift()));
            else if (kind === 3) cell = floats.shift();
            else if (kind === 4) cell = strings.shift();
            else if (kind !== 1) fail(`a cell of kind ${kind}`);
            this.row.push(cell);
            if (this.row.length === this.names.length) {
                this.rows.push(Object.fromEntries(this.names.map((name, at) => [name, this.row[at]])));
                this.row = [];
            }
        }
    }
}

// -- the engine: a worker of a browser that is told a port, and answers there

const port = { postMessage: (data) => hear(Buffer.from(data)), onmessage: null };
const quiet = { log() {}, warn() {}, error() {} };
const location = { href: "file:///engine_bundle.js" };
const self = { location };

// How a browser's worker reads a file at once.
class XMLHttpRequest {
    open(_, name) {
        this.name = path.basename(String(name));
    }
    send() {
        this.response = new Uint8Array(fs.readFileSync(path.join(folder, this.name))).buffer;
    }
}

// The engine tries whether it may have 64-bit memory, which some versions of Node.js have in half: always the one with 32.
const { Module } = WebAssembly;
WebAssembly.Module = class extends Module {
    constructor(code) {
        const [section, , , flags] = new Uint8Array(code.buffer ?? code).subarray(8, 12);
        if (section === 5 && flags & 4) throw new Error("no 64-bit memory");
        super(code);
    }
};

function WorkerGlobalScope() {}
Object.assign(globalThis, { self, location, XMLHttpRequest, WorkerGlobalScope, importScripts() {}, console: quiet, process: undefined });
vm.runInThisContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"));
self.onmessage({ data: port });

// The engine has begun by now, but for what it does in promises.
await new Promise((resolve) => setTimeout(resolve, 0));

const APPEND = 1, FINALIZE = 2, QUERY = 3;
let sequence = 0, waiting = null, rows = null, buffered = Buffer.alloc(0);

async function ask(method, ...parts) {
    const request = Buffer.concat([number(1, sequence++), number(2, method), ...parts]);
    return new Promise((resolve) => {
        waiting = resolve;
        port.onmessage({ data: new Uint8Array(bytes(1, request)) });
    });
}

function hear(data) {
    buffered = Buffer.concat([buffered, data]);
    while (buffered.length) {
        let size, at;
        [size, at] = readVarint(buffered, 1);
        if (buffered.length < at + Number(size)) return;
        const message = buffered.subarray(at, at + Number(size));
        buffered = buffered.subarray(at + Number(size));
        answer(message);
    }
}

function answer(message) {
    let last = true;
    for (const [field, value] of fields(message)) {
        if (field === 5) fail(value.toString()); // fatal_error
        if (field === 201) for (const [f, v] of fields(value)) if (f === 2) fail(v.toString());
        if (field === 209) for (const [f, v] of fields(value)) if (f === 1) fail(v.toString());
        if (field === 203) {
            rows.add(value);
            last = false;
            for (const [f, v] of fields(value))
                if (f === 3) for (const [g, w] of fields(v)) if (g === 6 && w) last = true;
        }
    }
    if (last) {
        const done = waiting;
        waiting = null;
        done();
    }
}

const queries = JSON.parse(fs.readFileSync(0, "utf8"));
await ask(APPEND, bytes(101, fs.readFileSync(trace)));
await ask(FINALIZE);
const answers = [];
for (const query of queries) {
    rows = new Rows();
    await ask(QUERY, bytes(103, bytes(1, Buffer.from(query))));
    answers.push(rows.rows);
}
process.stdout.write(JSON.stringify(answers) + "\n", () => process.exit(0));
