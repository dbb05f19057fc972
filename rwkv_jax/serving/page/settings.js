// The panels beside the conversation, the fields of the settings, and light and dark.
"use strict";

/**
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} type
 * @returns {T}
 */
function byId(id, type) {
  const node = document.getElementById(id);
  if (!(node instanceof type)) throw new TypeError(`#${id} is not a ${type.name}`);
  return node;
}

/** Fields of the form by name. */
function samplingFields() {
  const controls = byId("sampling", HTMLFieldSetElement).querySelectorAll("input, select");
  return /** @type {(HTMLInputElement | HTMLSelectElement)[]} */ ([...controls]);
}

/**
 * What the settings add to a request: of the sampling fields, those that are not empty.
 * @param {Settings} settings
 */
function requestOf({ sampling, thinking, probabilities }) {
  const filled = Object.entries(sampling).filter(([, value]) => value !== "");
  return {
    ...Object.fromEntries(filled.map(([name, value]) => [name, name === "order" ? value : Number(value)])),
    ...(thinking ? { chat_template_kwargs: { thinking } } : {}),
    ...(probabilities ? { logprobs: true, top_logprobs: 3 } : {}),
  };
}

/**
 * Shows the settings in their fields and keeps what is typed.
 * @param {Settings} settings
 */
function connectSampling(settings) {
  for (const field of samplingFields()) {
    field.value = settings.sampling[field.name] ?? "";
    field.addEventListener("change", () => {
      settings.sampling[field.name] = field.value;
      saveSettings(settings);
    });
  }
  byId("reset-sampling", HTMLButtonElement).addEventListener("click", () => {
    for (const field of samplingFields()) field.value = "";
    settings.sampling = {};
    saveSettings(settings);
  });
}

/** Whether all fields hold what they may; if not, the first that does not is shown and explained. */
function checkSettings() {
  const form = byId("settings-form", HTMLFormElement);
  if (form.checkValidity()) return true;
  openPanel("settings", "toggle-settings");
  form.reportValidity();
  return false;
}

/**
 * A button opens and closes a panel.
 * @param {string} panelId
 * @param {string} buttonId
 */
function connectPanel(panelId, buttonId) {
  const panel = byId(panelId, HTMLElement);
  const toggle = () => (panel.hidden ? openPanel : closePanel)(panelId, buttonId);
  byId(buttonId, HTMLButtonElement).addEventListener("click", toggle);
}

/**
 * @param {string} panelId
 * @param {string} buttonId
 */
function openPanel(panelId, buttonId) {
  byId(panelId, HTMLElement).hidden = false;
  byId(buttonId, HTMLButtonElement).setAttribute("aria-expanded", "true");
  byId(panelId, HTMLElement).focus();
}

/**
 * @param {string} panelId
 * @param {string} buttonId
 */
function closePanel(panelId, buttonId) {
  const panel = byId(panelId, HTMLElement);
  const hadFocus = panel.contains(document.activeElement);
  panel.hidden = true;
  byId(buttonId, HTMLButtonElement).setAttribute("aria-expanded", "false");
  if (hadFocus) byId(buttonId, HTMLButtonElement).focus();
}

/**
 * Light or dark as the system has it, until the button says otherwise.
 * @param {Settings} settings
 */
function connectTheme(settings) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = byId("toggle-theme", HTMLButtonElement);
  const isDark = () => (settings.theme ? settings.theme === "dark" : system.matches);
  const show = () => {
    document.documentElement.dataset.theme = isDark() ? "dark" : "light";
    button.setAttribute("aria-pressed", String(isDark()));
  };
  button.addEventListener("click", () => {
    settings.theme = isDark() ? "light" : "dark";
    saveSettings(settings);
    show();
  });
  system.addEventListener("change", show);
  show();
}

/**
 * Asks before something is deleted. Escape keeps it.
 * @param {string} question
 * @returns {Promise<boolean>}
 */
function confirmed(question) {
  const dialog = byId("confirm", HTMLDialogElement);
  byId("confirm-text", HTMLParagraphElement).textContent = question;
  byId("confirm-yes", HTMLButtonElement).onclick = () => dialog.close("yes");
  byId("confirm-no", HTMLButtonElement).onclick = () => dialog.close("no");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}
