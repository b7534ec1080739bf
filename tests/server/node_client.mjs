// Uses openai-node as its users do; prints one line a step. Arguments: base URL, model.
import assert from "node:assert";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const said = (text) => `say(${text})yas`;
const users = (text) => [{ role: "user", content: said(text) }];
const call = '{"name": "get_weather", "arguments": {"city": "Oslo"}}';
const tagged = `<tool_call>${call}</tool_call>`;
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const format = (name) => ({ name, schema: parameters, strict: true });

async function step(name, run) {
  await run();
  console.log("ok", name);
}

await step("models", async () => {
  const ids = [];
  for await (const found of client.models.list()) ids.push(found.id);
  assert(ids.includes(model));
});
await step("chat", async () => {
  const answer = await client.chat.completions.create({ model, messages: users("Paris") });
  assert.equal(answer.choices[0].message.content, "Paris");
});
await step("chat stream", async () => {
  const stream = await client.chat.completions.create({
    model, messages: users("Paris"), stream: true, stream_options: { include_usage: true },
  });
  let text = "", usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, "Paris");
  assert(usage.completion_tokens > 0);
});
await step("chat tool", async () => {
  const answer = await client.chat.completions.create({ model, messages: users(tagged), tools });
  const made = answer.choices[0].message.tool_calls[0].function;
  assert.deepEqual(JSON.parse(made.arguments), { city: "Oslo" });
});
await step("chat stream helper with a tool", async () => {
  const stream = client.chat.completions.stream({ model, messages: users(tagged), tools });
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].finish_reason, "tool_calls");
  assert.equal(final.choices[0].message.tool_calls[0].function.name, "get_weather");
});
await step("run tools", async () => {
  const asked = [];
  const runner = client.chat.completions.runTools({
    model,
    messages: users(tagged),
    tools: [{
      type: "function",
      function: {
        name: "get_weather",
        parameters,
        parse: JSON.parse,
        function: ({ city }) => { asked.push(city); return said("sunny"); },
      },
    }],
  });
  assert.equal(await runner.finalContent(), "sunny");
  assert.deepEqual(asked, ["Oslo"]);
});
await step("chat parse", async () => {
  const answer = await client.chat.completions.parse({
    model,
    messages: users('{"city": "Oslo"}'),
    response_format: { type: "json_schema", json_schema: format("city") },
  });
  assert.equal(answer.choices[0].message.content, '{"city": "Oslo"}');
});
await step("completions", async () => {
  const answer = await client.completions.create({ model, prompt: said("Paris") });
  assert.equal(answer.choices[0].text, "Paris");
});
await step("embeddings", async () => {
  const answer = await client.embeddings.create({ model, input: ["a", "b"] });
  assert.equal(answer.data.length, 2);
  assert.equal(typeof answer.data[0].embedding[0], "number");
});
await step("responses", async () => {
  const answer = await client.responses.create({ model, input: said("Paris") });
  assert.equal(answer.output_text, "Paris");
  const read = await client.responses.retrieve(answer.id);
  assert.equal(read.output_text, "Paris");
  const next = await client.responses.create({
    model, input: said("Oslo"), previous_response_id: answer.id,
  });
  assert.equal(next.output_text, "Oslo");
  await client.responses.delete(answer.id);
});
await step("responses stream with a tool", async () => {
  const stream = client.responses.stream({
    model, input: said(tagged), tools: [{ type: "function", ...tools[0].function, strict: false }],
  });
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  assert(kinds.includes("response.function_call_arguments.done"));
  const final = await stream.finalResponse();
  assert.equal(final.output[0].name, "get_weather");
});
await step("responses parse", async () => {
  const answer = await client.responses.parse({
    model,
    input: said('{"city": "Oslo"}'),
    text: { format: { type: "json_schema", ...format("city") } },
  });
  assert.equal(answer.output_text, '{"city": "Oslo"}');
});
await step("an error", async () => {
  await assert.rejects(
    client.chat.completions.create({ model, messages: [] }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "messages",
  );
});
