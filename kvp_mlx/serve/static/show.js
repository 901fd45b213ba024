/** How answers look: their text with code blocks, what was done for them, errors. */

/** An element of a class, with text or children. */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

/** Put an answer's text into a node; what stands between code fences becomes a block. */
export function showText(node, text) {
  const parts = text.split(/^```[^\n]*\n?/m);
  node.replaceChildren(...parts.map((part, number) => (number % 2 ? element("pre", "", part.replace(/\n$/, "")) : part)));
}

/** Say how a prompt was read, with a bar of its tokens. */
export function showFacts(node, { usage, reason, firstMs, seconds }) {
  const { prompt_tokens: prompt, completion_tokens: written, kvp } = usage;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const predicted = kvp.predicted_tokens;
  const counts = { cached, predicted, exact: Math.max(0, prompt - cached - predicted) };
  const names = { cached: "reused", predicted: "predicted", exact: "read" };
  const path = kvp.path === "kvp" ? "predicted" : "read in full";
  const line = element("div", "", `${path} · first token after ${duration(firstMs)} · ${count(prompt)} prompt tokens: `);
  const shown = Object.entries(counts).filter(([, tokens]) => tokens > 0);
  shown.forEach(([name, tokens], number) => {
    line.append(number ? ", " : "", element("span", `key ${name}`, `${count(tokens)} ${names[name]}`));
  });
  if (written > 1 && seconds > 0) line.append(` · ${(written / seconds).toFixed(1)} tokens/s`);
  if (reason === "length") line.append(" · cut: it reached the most tokens allowed");
  const bar = element("div", "bar");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", shown.map(([name, tokens]) => `${tokens} ${names[name]}`).join(", "));
  for (const [name, tokens] of shown) {
    const part = element("span", name);
    part.style.flexGrow = tokens;
    bar.append(part);
  }
  node.replaceChildren(line, bar);
}

/** Say how far a prompt is read. */
export function showProgress(node, { total, cache, processed }) {
  node.textContent = `reading: ${count(processed)} of ${count(total)} tokens${cache ? `, ${count(cache)} of them reused` : ""}`;
}

/** Say what went wrong. */
export function showError(node, error) {
  node.replaceChildren(element("span", "error", error.message));
}

/** A time for people. */
export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

function count(tokens) {
  return tokens.toLocaleString("en");
}
