// The whole API through openai-node.
//
// node node_flow.mjs FOLDER_WITH_NODE_MODULES '{"url": ..., "key": ..., "model": ..., "keys": {...}}'

import assert from 'node:assert/strict';
import fs from 'node:fs';
import { createRequire } from 'node:module';
import os from 'node:os';
import path from 'node:path';

const require = createRequire(path.join(process.argv[2], 'node_modules', 'x.js'));
const OpenAI = require('openai').OpenAI;
const { toFile } = require('openai');
const given = JSON.parse(process.argv[3]);
const model = given.model;
const client = (apiKey = given.key, options = {}) =>
  new OpenAI({ baseURL: given.url, apiKey, ...options });
const api = client();
const rows = Array.from({ length: 32 }, (_, i) =>
  JSON.stringify({ prompt: `${i} + 1 =`, completion: ` ${i + 1}` }) + '\n').join('');

const collect = async (list) => {
  const found = [];
  for await (const item of list) found.push(item);
  return found;
};

async function wait(read, ended, limitMs = 120_000) {
  const deadline = Date.now() + limitMs;
  for (;;) {
    const found = await read();
    if (ended.includes(found.status)) return found;
    assert(Date.now() < deadline, JSON.stringify(found));
    await new Promise((done) => setTimeout(done, 200));
  }
}

async function completions() {
  const options = { model, prompt: 'The cat', max_tokens: 8, temperature: 0 };
  const whole = await api.completions.create({ ...options, logprobs: 2, echo: true });
  assert.match(whole._request_id, /^req_/);
  const choice = whole.choices[0];
  assert.equal(choice.logprobs.token_logprobs[0], null);
  assert.equal(choice.logprobs.tokens.length, choice.logprobs.token_logprobs.length);
  const chunks = await collect(await api.completions.create(
    { ...options, stream: true, stream_options: { include_usage: true } }));
  assert.deepEqual(chunks.at(-1).usage, whole.usage);
  assert.equal(choice.text, 'The cat' + chunks.map((c) => c.choices[0]?.text ?? '').join(''));
  const { response } = await api.completions.create(options).withResponse();
  assert.match(response.headers.get('x-request-id'), /^req_/);
}

async function chat() {
  const options = {
    model,
    messages: [{ role: 'system', content: 'Be short.' }, { role: 'user', content: 'Hello' }],
    max_completion_tokens: 8,
    temperature: 0,
  };
  const whole = await api.chat.completions.create({ ...options, logprobs: true, top_logprobs: 3 });
  const content = whole.choices[0].message.content;
  const chunks = await collect(await api.chat.completions.create({ ...options, stream: true }));
  assert.equal(chunks[0].choices[0].delta.role, 'assistant');
  assert.equal(chunks.map((c) => c.choices[0].delta.content ?? '').join(''), content);
  const final = await api.chat.completions.stream(options).finalContent();
  assert.equal(final, content);
}

async function files() {
  const place = path.join(fs.mkdtempSync(path.join(os.tmpdir(), 'node-')), 'rows.jsonl');
  fs.writeFileSync(place, rows);
  const streamed = await api.files.create(
    { file: fs.createReadStream(place), purpose: 'fine-tune' });  // sent in chunks, no length
  assert.equal(streamed.bytes, rows.length);
  assert.equal(streamed.filename, 'rows.jsonl');
  const named = await api.files.create({
    file: await toFile(Buffer.from(rows), 'other.jsonl'),
    purpose: 'fine-tune',
    expires_after: { anchor: 'created_at', seconds: 3600 },
  });
  assert.equal(named.expires_at, named.created_at + 3600);
  await api.files.waitForProcessing(streamed.id);
  assert.equal(await (await api.files.content(streamed.id)).text(), rows);
  const listed = (await collect(api.files.list({ limit: 1 }))).map((file) => file.id);
  assert(listed.includes(streamed.id) && listed.includes(named.id));
  assert.equal((await api.files.delete(named.id)).deleted, true);
  await assert.rejects(api.files.retrieve(named.id), OpenAI.NotFoundError);
  return streamed.id;
}

async function uploads() {
  const upload = await api.uploads.create(
    { bytes: rows.length, filename: 'big.jsonl', mime_type: 'text/jsonl', purpose: 'fine-tune' });
  const ids = [];
  for (const piece of [rows.slice(0, 99), rows.slice(99)]) {
    const data = await toFile(Buffer.from(piece), 'part');
    ids.push((await api.uploads.parts.create(upload.id, { data })).id);
  }
  const done = await api.uploads.complete(upload.id, { part_ids: ids });
  assert.equal(done.file.bytes, rows.length);
  const dropped = await api.uploads.create(
    { bytes: 9, filename: 'a', mime_type: 'a/b', purpose: 'user_data' });
  assert.equal((await api.uploads.cancel(dropped.id)).status, 'cancelled');
}

async function fineTuning(fileId) {
  const jobs = api.fineTuning.jobs;
  const job = await jobs.create({
    model,
    training_file: fileId,
    suffix: 'official',
    method: {
      type: 'supervised',
      supervised: { hyperparameters: { n_epochs: 2, batch_size: 8 } },
    },
  });
  const dropped = await jobs.create({ model, training_file: fileId });
  assert.equal((await jobs.cancel(dropped.id)).status, 'cancelled');
  await assert.rejects(jobs.cancel(dropped.id), (error) => error.code === 'invalid_state');
  const listed = (await collect(jobs.list({ limit: 1 }))).map((found) => found.id);
  assert(listed.includes(job.id) && listed.includes(dropped.id));
  const found = await wait(
    () => jobs.retrieve(job.id), ['succeeded', 'failed', 'cancelled']);
  assert.equal(found.status, 'succeeded', JSON.stringify(found.error));
  const events = await collect(jobs.listEvents(job.id, { limit: 2 }));
  assert.equal(events[0].message, 'The job has successfully completed');
  assert((await collect(jobs.checkpoints.list(job.id))).length > 0);
  const table = await (await api.files.content(found.result_files[0])).text();
  assert.match(table, /^step,/);
  const tuned = found.fine_tuned_model;
  assert.equal((await api.completions.create({ model: tuned, prompt: '1 + 1 =' })).model, tuned);
  assert((await collect(api.models.list())).some((one) => one.id === tuned));
  assert.equal((await api.models.retrieve(tuned)).id, tuned);
  assert.equal((await api.models.delete(tuned)).deleted, true);
}

async function batches() {
  const body = { model, prompt: 'The cat', max_tokens: 4, temperature: 0 };
  const lines = [0, 1, 2].map((i) =>
    JSON.stringify({ custom_id: `row-${i}`, method: 'POST', url: '/v1/completions', body }));
  const file = await api.files.create(
    { file: await toFile(Buffer.from(lines.join('\n')), 'in.jsonl'), purpose: 'batch' });
  const wanted = {
    input_file_id: file.id, endpoint: '/v1/completions', completion_window: '24h',
  };
  const batch = await api.batches.create(wanted);
  const done = await wait(
    () => api.batches.retrieve(batch.id), ['completed', 'failed', 'expired']);
  assert.deepEqual(done.request_counts, { total: 3, completed: 3, failed: 0 });
  const text = await (await api.files.content(done.output_file_id)).text();
  assert.equal(text.trim().split('\n').length, 3);
  assert((await collect(api.batches.list({ limit: 1 }))).some((one) => one.id === batch.id));
  const other = await api.batches.create(wanted);
  assert(['cancelling', 'cancelled', 'completed'].includes(
    (await api.batches.cancel(other.id)).status));
}

async function embeddings() {
  const input = ['one', 'two'];
  const packed = await api.embeddings.create({ model, input });
  const plain = await api.embeddings.create({ model, input, encoding_format: 'float' });
  packed.data.forEach((item, i) => item.embedding.forEach((x, j) =>
    assert(Math.abs(x - plain.data[i].embedding[j]) < 1e-6)));
}

async function errors() {
  const asked = { model, prompt: 'x', max_tokens: 1 };
  const limited = client(given.keys.limited, { maxRetries: 0 });
  await limited.completions.create(asked);
  const calls = {
    key: () => client(given.keys.unknown).completions.create(asked),
    suspended: () => client(given.keys.suspended).completions.create(asked),
    project: () => client(given.key, { project: 'proj_x' }).models.list(),
    model: () => api.completions.create({ ...asked, model: 'absent' }),
    value: () => api.completions.create({ ...asked, temperature: 200 }),
    unknown: () => api.completions.create({ ...asked, temprature: 1 }),
    context: () => api.completions.create({ ...asked, prompt: 'x'.repeat(4000) }),
    rate: () => limited.completions.create(asked),
    file: () => api.fineTuning.jobs.create({ model, training_file: 'file-x' }),
    rows: async () => api.files.create(
      { file: await toFile(Buffer.from('{}\n['), 'a.jsonl'), purpose: 'fine-tune' }),
    after: () => api.files.list({ after: 'file-x' }),
    url: () => api.post('/nothing', { body: {} }),
    method: () => api.put('/models'),
  };
  const told = {};
  for (const [name, call] of Object.entries(calls)) {
    await assert.rejects(call(), (error) => {
      assert(error instanceof OpenAI.APIError, `${name}: ${error}`);
      assert.match(error.requestID, /^req_/);
      told[name] = [error.constructor.name, error.status, error.code, error.param];
      return true;
    });
  }
  const stream = await api.completions.create({ ...asked, max_tokens: 200, stream: true });
  for await (const chunk of stream) {
    assert(chunk.id);
    break;  // leaving a stream is no error
  }
  return told;
}

await completions();
await chat();
await embeddings();
await uploads();
await fineTuning(await files());
await batches();
console.log(JSON.stringify({ errors: await errors() }));
