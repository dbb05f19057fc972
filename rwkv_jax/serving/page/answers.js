// Questions and answers.
"use strict";

const SAVE_INTERVAL_MS = 2000;

/** Sends what is typed. */
async function send() {
  const prompt = byId("prompt", HTMLTextAreaElement);
  const text = prompt.value.trim();
  notice(page.generation ? "An answer is being written: wait for it, or stop it with Escape." : "");
  if (!text || page.generation || !checkSettings()) return;
  const { conversation } = page;
  if (!conversation.messages.length && conversation.root === null) conversation.title = titleOf(text);
  conversation.messages.push(newMessage("user", text));
  prompt.value = "";
  fitPrompt();
  await generate(conversation);
}

/** @param {Conversation} conversation its last message is the user's */
async function generate(conversation) {
  const message = newMessage("assistant", "");
  conversation.messages.push(message);
  conversation.updated = Date.now();
  const generation = { conversation, message, stopper: new AbortController() };
  page.generation = generation;
  page.announcer.start();
  const saving = save(conversation);
  show(conversation);
  await saving;
  try {
    await receive(generation);
  } catch (error) {
    message.finish = generation.stopper.signal.aborted ? "stopped" : "error";
    if (message.finish === "error") message.error = inWords(error);
  }
  message.finish ??= "stop";
  page.generation = null;
  if (page.conversation === conversation) page.views.at(-1)?.update();
  page.announcer.follow(message);
  page.announcer.say(message.error || `End of the answer. ${endingOf(message)}`);
  showActions();
  followText();
  await saveProgress(conversation);
}

/** @param {Conversation} conversation that may have been deleted since its question was sent */
async function saveProgress(conversation) {
  if (page.store.conversations.has(conversation.id)) await save(conversation);
}

/**
 * Streams an answer. All of the conversation is sent where the server has lost its state, or has another model now, or
 * the model's chat template cannot go on from a state.
 * @param {Generation} generation
 */
async function receive(generation) {
  const { conversation, message } = generation;
  const turn = turnOf(conversation, conversation.messages.length - 1);
  try {
    await receiveTurn(generation, turn);
  } catch (error) {
    if (error instanceof ServerError && error.param === "return_state") {
      page.hasStates = false;
      return receiveTurn(generation, turn);
    }
    const isOfState = error instanceof ServerError && ["state", "messages"].includes(error.param ?? "");
    const hasBegun = message.content || message.reasoning;
    if (!isOfState || hasBegun || !turn.state || turn.state === conversation.root) throw error;
    forgetStates(conversation);
    await receiveTurn(generation, turnOf(conversation, conversation.messages.length - 1));
  }
}

/**
 * @param {Generation} generation
 * @param {ReturnType<typeof turnOf>} turn
 */
async function receiveTurn({ conversation, message, stopper }, turn) {
  const body = { model: byId("model", HTMLSelectElement).value, ...turn, ...requestOf(page.settings) };
  if (page.hasStates) Object.assign(body, { return_state: "id" });
  const start = performance.now();
  const timing = { numTokens: null, seconds: 0, firstToken: /** @type {number | null} */ (null) };
  const show = oncePerFrame(() => showProgress(conversation, message));
  let saved = start;
  for await (const chunk of streamChat(body, stopper.signal)) {
    const now = performance.now();
    const before = message.content.length + message.reasoning.length;
    addChunk(message, chunk);
    if (message.content.length + message.reasoning.length > before) {
      timing.firstToken ??= (now - start) / 1000;
      timing.seconds = (now - start) / 1000 - timing.firstToken;
    }
    message.timing = { ...timing, numTokens: chunk.usage?.completion_tokens ?? null };
    show();
    if (now - saved > SAVE_INTERVAL_MS) {
      saved = now;
      await saveProgress(conversation);
    }
  }
}

/**
 * Calls it when the next frame is drawn, however often it was asked for.
 * @param {() => void} run
 */
function oncePerFrame(run) {
  let isWaiting = false;
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      run();
    });
  };
}

/**
 * @param {Conversation} conversation
 * @param {Message} message
 */
function showProgress(conversation, message) {
  if (page.generation?.message !== message) return;
  page.announcer.follow(message);
  if (page.conversation !== conversation) return;
  const isAtEnd = messagesNode().scrollHeight - messagesNode().scrollTop - messagesNode().clientHeight < 60;
  page.views.at(-1)?.update();
  if (isAtEnd) followText();
}

function followText() {
  messagesNode().scrollTop = messagesNode().scrollHeight;
}

function stopAnswer() {
  page.generation?.stopper.abort();
}

/** @param {Conversation} conversation its last message is an answer, in whose place comes another */
async function regenerate(conversation) {
  if (page.generation || !checkSettings()) return;
  const answer = conversation.messages.pop();
  byId("prompt", HTMLElement).focus();
  if (answer?.state) dropStates([answer.state]);
  await generate(conversation);
}
