import {
  type CallOptions,
  type ClientReadableStream,
  type MethodDefinition,
  Metadata,
  type ServiceError,
} from "@grpc/grpc-js";

import {
  ExportServiceClient,
  ExportServiceDefinition,
  ExportServiceService,
} from "./gen/exportd/v1/export_service.js";

type Methods = ExportServiceDefinition["methods"];

/** What one call may be given: gRPC's call options, and metadata. */
export interface CallSettings extends CallOptions {
  readonly metadata?: Metadata;
}

type Call<Method> = Method extends {
  requestType: { fromPartial(object: infer Request): unknown };
  responseType: { fromPartial(object: never): infer Response };
  responseStream: infer Streams;
}
  ? (
      request: Request,
      settings?: CallSettings,
    ) => Streams extends true ? ClientReadableStream<Response> : Promise<Response>
  : never;

/**
 * The methods of the service. Requests need only the fields that matter. Methods with one
 * answer give a promise of it; the others a stream, to be read with `for await`. Both fail
 * with gRPC's own `ServiceError`.
 */
export type Calls = { readonly [Name in keyof Methods]: Call<Methods[Name]> };

/** A connection to one server. */
export interface Client extends Calls {
  /** The generated stub, with callbacks. */
  readonly stub: ExportServiceClient;

  /** End the connection; calls under way go on to their end. */
  close(): void;
}

/** The calls of a stub. Those with one answer have `timeout` milliseconds unless told. */
export function clientOf(stub: ExportServiceClient, timeout: number): Client {
  const client: Record<string, unknown> = {
    stub,
    close: () => {
      stub.close();
    },
  };
  for (const [name, { requestType }] of Object.entries(ExportServiceDefinition.methods)) {
    const method = ExportServiceService[name as keyof Methods] as unknown as MethodDefinition<
      unknown,
      unknown
    >;
    const complete = (request: unknown): unknown => requestType.fromPartial(request as never);
    client[name] = method.responseStream
      ? streaming(stub, method, complete)
      : single(stub, method, complete, timeout);
  }
  return client as unknown as Client;
}

function single(
  stub: ExportServiceClient,
  method: MethodDefinition<unknown, unknown>,
  complete: (request: unknown) => unknown,
  timeout: number,
) {
  return (request: unknown, settings: CallSettings = {}): Promise<unknown> => {
    const { metadata = new Metadata(), ...options } = settings;
    options.deadline ??= Date.now() + timeout;
    return new Promise((resolve, reject) => {
      stub.makeUnaryRequest(
        method.path,
        method.requestSerialize,
        method.responseDeserialize,
        complete(request),
        metadata,
        options,
        (error: ServiceError | null, response?: unknown) => {
          if (error) reject(error);
          else resolve(response);
        },
      );
    });
  };
}

function streaming(
  stub: ExportServiceClient,
  method: MethodDefinition<unknown, unknown>,
  complete: (request: unknown) => unknown,
) {
  return (request: unknown, settings: CallSettings = {}): ClientReadableStream<unknown> => {
    const { metadata = new Metadata(), ...options } = settings;
    return stub.makeServerStreamRequest(
      method.path,
      method.requestSerialize,
      method.responseDeserialize,
      complete(request),
      metadata,
      options,
    );
  };
}
