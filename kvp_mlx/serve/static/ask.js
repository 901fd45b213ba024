/** A form with a text, files and a stop button: what chat and race have in common. */

const MAX_FILE_BYTES = 2 ** 24;

/**
 * Make a form ask.
 * @param {HTMLFormElement} form
 * @param {(text: string, signal: AbortSignal) => Promise<void>} onText called with what was asked; one at a time.
 * @returns {(work: (signal: AbortSignal) => Promise<void>) => Promise<void>} does other work the same way.
 */
export function asking(form, onText) {
  const { text, file, stop } = form.elements;
  const submit = form.querySelector("[type=submit]");
  let abort = null;

  async function working(work) {
    if (abort) return;
    abort = new AbortController();
    submit.hidden = true;
    stop.hidden = false;
    try {
      await work(abort.signal);
    } finally {
      abort = null;
      submit.hidden = false;
      stop.hidden = true;
      text.focus();
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const asked = text.value.trim();
    if (asked) working((signal) => onText(asked, signal));
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (form.offsetParent === null) return; // another view is shown
    if (event.key === "Escape") abort?.abort();
    const isTyping = event.target.matches("input, textarea, select");
    if (event.key === "/" && !isTyping) {
      event.preventDefault();
      text.focus();
    }
  });
  stop.addEventListener("click", () => abort?.abort());
  file.addEventListener("change", async () => {
    for (const each of file.files) {
      const isText = each.size <= MAX_FILE_BYTES && !(await each.slice(0, 8192).text()).includes("\0");
      const content = isText ? await each.text() : "";
      text.setCustomValidity(isText ? "" : `${each.name} is no text of at most 16 MiB`);
      if (!text.reportValidity()) text.setCustomValidity("");
      if (content) text.value = `${text.value}${text.value ? "\n\n" : ""}${each.name}:\n${content}`;
    }
    file.value = "";
    text.focus();
  });
  return working;
}
