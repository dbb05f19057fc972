// What is done with whole conversations, and with their states at the server.
"use strict";

/** @param {Conversation} conversation */
async function save(conversation) {
  try {
    await page.store.save(conversation);
  } catch (error) {
    notice(`The conversation could not be stored in this browser: ${inWords(error)}`);
  }
}

function startConversation() {
  choose(newConversation(page.settings.system));
}

/**
 * Another conversation that goes on from before message `end`; the server goes on from its state, so nothing is read.
 * @param {Conversation} conversation
 * @param {number} end
 */
async function fork(conversation, end) {
  const copy = forkConversation(conversation, end);
  await save(copy);
  choose(copy);
  page.announcer.say(`A fork: ${copy.title}`);
}

/**
 * @param {Conversation} conversation
 * @param {number} i of the user's message that the fork asks otherwise
 */
async function edit(conversation, i) {
  await fork(conversation, i);
  byId("prompt", HTMLTextAreaElement).value = conversation.messages[i].content;
  fitPrompt();
}

/** @param {Conversation} conversation */
async function removeConversation(conversation) {
  if (!(await confirmed(`Delete “${conversation.title}”, and its states at the server?`))) return;
  if (page.generation?.conversation === conversation) stopAnswer();
  await page.store.remove(conversation.id);
  dropStates(statesOf(conversation));
  if (page.conversation === conversation) startConversation();
  else showList();
  byId("new-conversation", HTMLElement).focus();
}

/**
 * Deletes those of the states at the server that no conversation needs any more.
 * @param {string[]} ids
 */
function dropStates(ids) {
  deleteStates(unusedStates(ids, page.store.conversations.values()));
}

/**
 * Downloads the state after an answer.
 * @param {Conversation} conversation
 * @param {string} id
 */
async function saveState(conversation, id) {
  notice("");
  try {
    const url = URL.createObjectURL(await fetchState(id));
    const name = conversation.title.replaceAll(/[^\p{L}\p{N}]+/gu, "-").replaceAll(/^-|-$/g, "") || "conversation";
    element("a", { href: url, download: `${name}.safetensors` }).click();
    URL.revokeObjectURL(url);
  } catch (error) {
    notice(inWords(error));
  }
}

/** Begins a conversation with the state file that was chosen. */
async function loadState() {
  const input = byId("state-file", HTMLInputElement);
  const file = input.files?.[0];
  input.value = "";
  if (!file) return;
  notice("");
  const conversation = { ...newConversation(""), title: file.name, root: `page-${newId()}` };
  try {
    await putState(conversation.root, file);
    await save(conversation);
    choose(conversation);
  } catch (error) {
    notice(`${file.name}: ${inWords(error)}`);
  }
}

/** Another system prompt is another past: the states after the old one are of no use. */
async function changeSystem() {
  const { conversation } = page;
  conversation.system = byId("system", HTMLTextAreaElement).value;
  page.settings.system = conversation.system;
  saveSettings(page.settings);
  if (!conversation.messages.length) return;
  const states = statesOf(conversation);
  forgetStates(conversation);
  dropStates(states);
  showActions();
  await save(conversation);
}
