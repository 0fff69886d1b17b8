// What tests/clients/test_ai_sdk.py runs: the AI SDK's questions to a server, its answers as JSON.
import { readFileSync } from 'node:fs';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, jsonSchema, streamText, tool } from 'ai';
import { z } from 'zod';

const [port, picture] = process.argv.slice(2);
const server = createOpenAICompatible({
  name: 'pipes',
  baseURL: `http://127.0.0.1:${port}/v1`,
  apiKey: 'x',
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const city = z.object({ city: z.enum(['Bonn', 'Ulm']) }).strict();
const messages = [
  {
    role: 'user',
    content: [
      { type: 'image', image: readFileSync(picture), mediaType: 'image/png' },
      { type: 'text', text: 'Describe the picture.' },
    ],
  },
];
const asked = { model: server('shapes'), maxRetries: 0 };

const { text } = await generateText({ ...asked, prompt: 'Who?', maxOutputTokens: 20 });
const stream = streamText({ ...asked, messages });
const parts = [];
for await (const part of stream.textStream) parts.push(part);
const usage = await stream.usage;
const { object } = await generateObject({ ...asked, messages, schema: city, maxOutputTokens: 300 });
const { toolCalls } = await generateText({
  ...asked,
  model: server('calling'),
  prompt: 'Who?',
  tools: { weather: tool({ inputSchema: jsonSchema(z.toJSONSchema(city)) }) },
  toolChoice: 'required',
  maxOutputTokens: 300,
});
let refused;
try {
  await generateText({ ...asked, model: server('none'), prompt: 'Who?' });
} catch (error) {
  refused = { status: error.statusCode, message: error.message };
}
console.log(JSON.stringify({ text, parts, usage, object, input: toolCalls[0].input, refused }));
