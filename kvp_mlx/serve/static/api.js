/** The server's API, as the page uses it: the model's name, and streamed answers. */

/** What the server says of itself; throws an Error with its own words. */
export async function modelName(key) {
  const response = await fetch("/v1/models", { headers: headers(key) });
  if (!response.ok) throw new Error(await told(response));
  return (await response.json()).data[0].id;
}

/**
 * Answer messages, yielding what comes: {progress}, {text}, {thought}, {reason}, {usage}.
 * @param {{messages: object[], fields: object, key: string, signal: AbortSignal}} request
 *   `fields` go into the body as they are (kvp, temperature, ...).
 */
export async function* answer({ messages, fields, key, signal }) {
  const body = { messages, stream: true, stream_options: { include_usage: true }, return_progress: true, ...fields };
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await told(response));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.prompt_progress) yield { progress: chunk.prompt_progress };
    const choice = chunk.choices?.[0];
    if (choice?.delta?.reasoning_content) yield { thought: choice.delta.reasoning_content };
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { reason: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function told(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/** The data of server-sent events; comments keep the connection alive and say nothing. */
async function* events(stream) {
  let rest = "";
  for await (const text of texts(stream)) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

async function* texts(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
