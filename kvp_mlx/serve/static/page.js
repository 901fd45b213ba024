/** The page: two views and a dial, whose settings stay in this tab. */

import { modelName } from "./api.js";
import { chat } from "./chat.js";
import { race } from "./race.js";

const form = document.querySelector("#dial");
const STORED = "kvp-dial";
const NUMBERS = ["exact_head", "exact_tail", "recompute"];

/** What the dial says: fields of a request's body, and the API key. */
function settings() {
  const said = Object.fromEntries(new FormData(form));
  const kvp = {};
  if (said.quality) kvp.quality = said.quality;
  if (said.path) kvp.path = said.path;
  for (const name of NUMBERS) if (said[name] !== "") kvp[name] = Number(said[name]);
  const fields = Object.keys(kvp).length ? { kvp } : {};
  if (said.temperature !== "") fields.temperature = Number(said.temperature);
  if (said.max_tokens !== "") fields.max_tokens = Number(said.max_tokens);
  return { fields, key: said.key };
}

function show(view) {
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== view;
  for (const button of document.querySelectorAll("[data-view]")) {
    button.setAttribute("aria-pressed", button.dataset.view === view);
  }
  document.querySelector(`#${view} textarea`).focus();
}

async function connect() {
  const place = document.querySelector("#model");
  try {
    place.textContent = await modelName(settings().key);
    place.classList.remove("error");
  } catch (error) {
    place.textContent = error.message;
    place.classList.add("error");
  }
}

function restore() {
  const stored = JSON.parse(sessionStorage.getItem(STORED) ?? "{}");
  for (const [name, value] of Object.entries(stored)) if (form.elements[name]) form.elements[name].value = value;
}

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("change", (event) => {
  sessionStorage.setItem(STORED, JSON.stringify(Object.fromEntries(new FormData(form))));
  if (event.target.name === "key") connect();
});
for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => show(button.dataset.view));
}
document.addEventListener("click", (event) => {
  const panel = document.querySelector("#settings");
  if (!panel.contains(event.target)) panel.open = false;
});

restore();
chat(document.querySelector("#chat"), settings);
race(document.querySelector("#race"), settings);
show("chat");
connect();
