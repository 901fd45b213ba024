/** The chat: messages, and beside each answer what was done for it. */

import { answer } from "./api.js";
import { asking } from "./ask.js";
import { element, showError, showFacts, showProgress, showText } from "./show.js";

/**
 * @param {HTMLElement} section
 * @param {() => {fields: object, key: string}} settings what the dial says now.
 */
export function chat(section, settings) {
  const form = section.querySelector("form");
  const turns = section.querySelector("#turns");
  const { text, clear, again } = form.elements;
  let messages = [];

  const working = asking(form, (asked, signal) => {
    messages.push({ role: "user", content: asked });
    turns.append(element("div", "turn user", element("div", "said", asked)));
    text.value = "";
    return reply(signal);
  });

  async function reply(signal) {
    const [said, facts, thought] = [element("div", "answer"), element("div", "facts"), element("div", "thought")];
    thought.hidden = true;
    const turn = element("article", "turn", thought, said, facts);
    turns.append(turn);
    turn.scrollIntoView({ block: "end" });
    again.disabled = true;
    const asked = messages;
    const result = await streamed({ messages, ...settings(), signal }, { said, facts, thought });
    if (asked !== messages) return; // a new chat was begun meanwhile
    if (result.text) messages.push({ role: "assistant", content: result.text });
    again.disabled = !messages.length;
    turn.scrollIntoView({ block: "end" });
  }

  again.addEventListener("click", () => working((signal) => {
    if (messages.at(-1)?.role === "assistant") messages = messages.slice(0, -1);
    if (turns.lastElementChild?.matches("article")) turns.lastElementChild.remove();
    return reply(signal);
  }));
  clear.addEventListener("click", () => {
    form.elements.stop.click();
    messages = [];
    turns.replaceChildren();
    again.disabled = true;
    text.focus();
  });
}

/**
 * Show an answer as it comes; never throws.
 * @returns {Promise<{text: string, firstMs: number?, usage: object?}>} what came of it.
 */
export async function streamed(request, { said, facts, thought, onFirst = () => {} }) {
  const begun = performance.now();
  const result = { text: "", thought: "", firstMs: null, usage: null, reason: null };
  try {
    for await (const part of answer(request)) {
      if (part.progress && result.firstMs === null) showProgress(facts, part.progress);
      if ((part.text || part.thought) && result.firstMs === null) {
        result.firstMs = performance.now() - begun;
        onFirst(result.firstMs);
        facts.textContent = "";
      }
      if (part.thought && thought) {
        thought.hidden = false;
        thought.textContent = result.thought += part.thought;
      }
      if (part.text) showText(said, (result.text += part.text));
      if (part.reason) result.reason = part.reason;
      if (part.usage) result.usage = part.usage;
    }
    const seconds = (performance.now() - begun - result.firstMs) / 1000;
    if (result.usage) showFacts(facts, { ...result, seconds });
  } catch (error) {
    if (error.name === "AbortError") facts.textContent = "stopped";
    else showError(facts, error);
  }
  return result;
}
