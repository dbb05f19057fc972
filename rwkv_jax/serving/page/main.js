// Connects the document with the rest, and starts.
"use strict";

const PANELS = [
  ["sidebar", "toggle-sidebar"],
  ["settings", "toggle-settings"],
];

async function showModels() {
  const select = byId("model", HTMLSelectElement);
  try {
    select.replaceChildren(...(await fetchModels()).map((name) => element("option", {}, name)));
    notice("");
  } catch (error) {
    notice(inWords(error));
  }
}

/** Lets the field grow with its text. */
function fitPrompt() {
  const prompt = byId("prompt", HTMLTextAreaElement);
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

/** @param {KeyboardEvent} event */
function onPromptKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
}

/** Stops the answer that is being written, or else closes the panel that has the focus. */
function onEscape() {
  if (page.generation) return stopAnswer();
  for (const [panel, button] of PANELS) {
    if (byId(panel, HTMLElement).contains(document.activeElement)) closePanel(panel, button);
  }
}

function connectButtons() {
  /** @type {[string, () => void][]} */
  const buttons = [
    ["new-conversation", startConversation],
    ["load-state", () => byId("state-file", HTMLInputElement).click()],
    ["stop", stopAnswer],
    ["close-settings", () => closePanel("settings", "toggle-settings")],
  ];
  for (const [id, run] of buttons) byId(id, HTMLButtonElement).addEventListener("click", run);
  byId("state-file", HTMLInputElement).addEventListener("change", loadState);
  byId("composer", HTMLFormElement).addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("settings-form", HTMLFormElement).addEventListener("submit", (event) => event.preventDefault());
  byId("prompt", HTMLTextAreaElement).addEventListener("keydown", onPromptKey);
  byId("prompt", HTMLTextAreaElement).addEventListener("input", fitPrompt);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("confirm", HTMLDialogElement).open) onEscape();
  });
}

function connectSettings() {
  connectSampling(page.settings);
  connectTheme(page.settings);
  for (const [panel, button] of PANELS) connectPanel(panel, button);
  if (!matchMedia(WIDE).matches) closePanel("sidebar", "toggle-sidebar");
  const probabilities = byId("probabilities", HTMLInputElement);
  probabilities.checked = page.settings.probabilities;
  probabilities.addEventListener("change", () => {
    page.settings.probabilities = probabilities.checked;
    saveSettings(page.settings);
    show(page.conversation);
  });
  byId("system", HTMLTextAreaElement).addEventListener("change", changeSystem);
  const thinking = byId("thinking", HTMLSelectElement);
  thinking.value = page.settings.thinking;
  thinking.addEventListener("change", () => {
    page.settings.thinking = thinking.value;
    saveSettings(page.settings);
  });
  const key = byId("api-key", HTMLInputElement);
  key.value = apiKey.get();
  key.addEventListener("change", () => {
    apiKey.set(key.value.trim());
    showModels();
  });
}

/** Shows what was shown last; an answer that was being written when the page was closed is at its end. */
async function start() {
  connectButtons();
  connectSettings();
  const isStored = await page.store.open();
  for (const { messages } of page.store.list()) {
    for (const message of messages) message.finish ??= "interrupted";
  }
  show(page.store.conversations.get(page.settings.current) ?? newConversation(page.settings.system));
  byId("prompt", HTMLElement).focus();
  await showModels();
  if (!isStored) notice("This browser stores nothing here: conversations are lost when the page is closed.");
}

start();
