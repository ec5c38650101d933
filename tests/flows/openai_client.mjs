// The official Node client against the gateway. Arguments come from the environment; prints one
// JSON object of facts that test_openai_node.py asserts on.
import OpenAI from "openai";

const [model, question] = [process.env.MODEL, process.env.QUESTION];
const client = new OpenAI({
  baseURL: process.env.BASE_URL,
  apiKey: process.env.API_KEY,
  maxRetries: 0,
});
const messages = [{ role: "user", content: question }];
const ask = (extra) => client.chat.completions.create({ model, messages, temperature: 0, ...extra });
const facts = {};

facts.models = [];
for await (const one of client.models.list()) facts.models.push(one.id);

const whole = await ask({});
facts.text = whole.choices[0].message.content;
facts.finish = whole.choices[0].finish_reason;
facts.usage = whole.usage;

facts.streamed = "";
for await (const chunk of await ask({ stream: true, stream_options: { include_usage: true } })) {
  facts.streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) facts.streamedUsage = chunk.usage;
}

const sampled = { n: 3, seed: 11, temperature: 2, max_tokens: 16 };
const texts = async (extra) => (await ask({ ...sampled, ...extra })).choices.map((c) => c.message.content);
facts.seeded = [await texts({}), await texts({})];

const word = facts.text.split(" ")[4];
facts.stopped = (await ask({ stop: [word] })).choices[0].message.content;
facts.expectedStopped = facts.text.slice(0, facts.text.indexOf(word));

const scored = await ask({ logprobs: true, top_logprobs: 2, max_tokens: 3 });
facts.logprobs = scored.choices[0].logprobs.content.map((token) => token.top_logprobs.length);

facts.errors = {};
const fails = async (name, call) => {
  try {
    await call();
    facts.errors[name] = "no error";
  } catch (error) {
    facts.errors[name] = [error.constructor.name, error.status, error.code];
  }
};
await fails("unknown", () => ask({ model: "nobody" }));
await fails("bad", () => ask({ temperature: 9 }));
await fails("key", () => client.withOptions({ apiKey: "wrong" }).models.list());

console.log(JSON.stringify(facts));
