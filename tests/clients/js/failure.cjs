// How a call failed, in a form that is JSON: its error's class by name and by instanceof, and what the error says.
exports.failure = async function failure(call, kinds = {}) {
  try {
    return { resolved: await call() };
  } catch (error) {
    return {
      name: error.name,
      is: Object.keys(kinds).filter((name) => error instanceof kinds[name]),
      message: error.message,
      status: error.status,
      body: error.body ?? null,
      requestId: error.requestId,
      isUserTimeout: error.isUserTimeout ?? null,
      fields: (error.fieldErrors ?? []).map((field) => ({ at: field.loc.join("."), type: field.type })),
    };
  }
};
