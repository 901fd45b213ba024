/** The race: one question by prediction and by full prefill, each on an empty cache, with running clocks. */

import { asking } from "./ask.js";
import { streamed } from "./chat.js";
import { duration } from "./show.js";

const LANES = ["kvp", "full"];

/** @param {HTMLElement} section @param {() => {fields: object, key: string}} settings what the dial says now. */
export function race(section, settings) {
  const verdict = section.querySelector("#verdict");

  asking(section.querySelector("form"), async (asked, signal) => {
    const lanes = LANES.map((name) => section.querySelector(`[data-lane=${name}]`));
    lanes.forEach(empty);
    verdict.textContent = "";
    const results = [];
    for (const [number, lane] of lanes.entries()) {
      if (signal.aborted) return;
      results.push(await run(lane, LANES[number], asked, settings(), signal));
    }
    const [predicted, full] = results;
    if (predicted.firstMs && full.firstMs) verdict.textContent = compare(predicted, full);
  });
}

async function run(lane, path, asked, { fields, key }, signal) {
  const clock = lane.querySelector(".clock");
  const begun = performance.now();
  let isReading = true;
  const tick = () => {
    if (!isReading) return;
    clock.textContent = duration(performance.now() - begun);
    requestAnimationFrame(tick);
  };
  lane.className = "running";
  tick();
  const dial = path === "full" ? { path } : { ...fields.kvp, path };
  const result = await streamed(
    {
      messages: [{ role: "user", content: asked }],
      fields: { ...fields, temperature: 0, kvp: dial, cache_prompt: false },
      key,
      signal,
    },
    {
      said: lane.querySelector(".answer"),
      facts: lane.querySelector(".facts"),
      onFirst: (ms) => {
        isReading = false;
        clock.textContent = duration(ms);
        lane.className = "done";
      },
    },
  );
  isReading = false;
  if (result.firstMs === null) lane.className = "";
  return result;
}

function empty(lane) {
  lane.className = "";
  lane.querySelector(".clock").textContent = "–";
  lane.querySelector(".answer").replaceChildren();
  lane.querySelector(".facts").replaceChildren();
}

function compare(predicted, full) {
  const ratio = full.firstMs / predicted.firstMs;
  const said = predicted.text === full.text ? "the same answer" : "another answer";
  const speed = ratio >= 1 ? `${ratio.toFixed(2)} times sooner` : `${(1 / ratio).toFixed(2)} times later`;
  return `By prediction the first token came ${speed}, with ${said}.`;
}
