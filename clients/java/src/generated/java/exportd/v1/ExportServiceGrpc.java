package exportd.v1;

import static io.grpc.MethodDescriptor.generateFullMethodName;

/**
 * <pre>
 * Runs dataset exports as background jobs.
 * Every error carries `google.rpc.ErrorInfo` with domain `exportd` and a reason from
 * `ErrorReason`. Any method may answer UNAVAILABLE while the server shuts down, and
 * INTERNAL with a reference that the operator can look up.
 * Where the server wants to know who calls, credentials travel as metadata
 * `authorization: Bearer &lt;API key or token&gt;`, or as a client certificate. They say whose
 * jobs the caller sees and what it may do: scope `exports.read` for the methods that
 * only read, `exports.write` for CreateExport, CancelJob, DeleteJob, RedriveDeliveries
 * and EnableSinkQueue; `admin` is both, and ListAuditRecords, which tells of all tenants.
 * Any method may answer UNAUTHENTICATED, PERMISSION_DENIED with the scope that is
 * missing, and RESOURCE_EXHAUSTED `QUOTA_EXCEEDED` when the caller's tenant asks too often
 * or has too many calls open.
 * </pre>
 */
@io.grpc.stub.annotations.GrpcGenerated
public final class ExportServiceGrpc {

  private ExportServiceGrpc() {}

  public static final java.lang.String SERVICE_NAME = "exportd.v1.ExportService";

  // Static method descriptors that strictly reflect the proto.
  private static volatile io.grpc.MethodDescriptor<exportd.v1.ListDatasetsRequest,
      exportd.v1.ListDatasetsResponse> getListDatasetsMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "ListDatasets",
      requestType = exportd.v1.ListDatasetsRequest.class,
      responseType = exportd.v1.ListDatasetsResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.ListDatasetsRequest,
      exportd.v1.ListDatasetsResponse> getListDatasetsMethod() {
    io.grpc.MethodDescriptor<exportd.v1.ListDatasetsRequest, exportd.v1.ListDatasetsResponse> getListDatasetsMethod;
    if ((getListDatasetsMethod = ExportServiceGrpc.getListDatasetsMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getListDatasetsMethod = ExportServiceGrpc.getListDatasetsMethod) == null) {
          ExportServiceGrpc.getListDatasetsMethod = getListDatasetsMethod =
              io.grpc.MethodDescriptor.<exportd.v1.ListDatasetsRequest, exportd.v1.ListDatasetsResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "ListDatasets"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListDatasetsRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListDatasetsResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("ListDatasets"))
              .build();
        }
      }
    }
    return getListDatasetsMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.GetDatasetRequest,
      exportd.v1.GetDatasetResponse> getGetDatasetMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "GetDataset",
      requestType = exportd.v1.GetDatasetRequest.class,
      responseType = exportd.v1.GetDatasetResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.GetDatasetRequest,
      exportd.v1.GetDatasetResponse> getGetDatasetMethod() {
    io.grpc.MethodDescriptor<exportd.v1.GetDatasetRequest, exportd.v1.GetDatasetResponse> getGetDatasetMethod;
    if ((getGetDatasetMethod = ExportServiceGrpc.getGetDatasetMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getGetDatasetMethod = ExportServiceGrpc.getGetDatasetMethod) == null) {
          ExportServiceGrpc.getGetDatasetMethod = getGetDatasetMethod =
              io.grpc.MethodDescriptor.<exportd.v1.GetDatasetRequest, exportd.v1.GetDatasetResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "GetDataset"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.GetDatasetRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.GetDatasetResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("GetDataset"))
              .build();
        }
      }
    }
    return getGetDatasetMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.CreateExportRequest,
      exportd.v1.CreateExportResponse> getCreateExportMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "CreateExport",
      requestType = exportd.v1.CreateExportRequest.class,
      responseType = exportd.v1.CreateExportResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.CreateExportRequest,
      exportd.v1.CreateExportResponse> getCreateExportMethod() {
    io.grpc.MethodDescriptor<exportd.v1.CreateExportRequest, exportd.v1.CreateExportResponse> getCreateExportMethod;
    if ((getCreateExportMethod = ExportServiceGrpc.getCreateExportMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getCreateExportMethod = ExportServiceGrpc.getCreateExportMethod) == null) {
          ExportServiceGrpc.getCreateExportMethod = getCreateExportMethod =
              io.grpc.MethodDescriptor.<exportd.v1.CreateExportRequest, exportd.v1.CreateExportResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "CreateExport"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.CreateExportRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.CreateExportResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("CreateExport"))
              .build();
        }
      }
    }
    return getCreateExportMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.GetJobRequest,
      exportd.v1.GetJobResponse> getGetJobMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "GetJob",
      requestType = exportd.v1.GetJobRequest.class,
      responseType = exportd.v1.GetJobResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.GetJobRequest,
      exportd.v1.GetJobResponse> getGetJobMethod() {
    io.grpc.MethodDescriptor<exportd.v1.GetJobRequest, exportd.v1.GetJobResponse> getGetJobMethod;
    if ((getGetJobMethod = ExportServiceGrpc.getGetJobMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getGetJobMethod = ExportServiceGrpc.getGetJobMethod) == null) {
          ExportServiceGrpc.getGetJobMethod = getGetJobMethod =
              io.grpc.MethodDescriptor.<exportd.v1.GetJobRequest, exportd.v1.GetJobResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "GetJob"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.GetJobRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.GetJobResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("GetJob"))
              .build();
        }
      }
    }
    return getGetJobMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.ListJobsRequest,
      exportd.v1.ListJobsResponse> getListJobsMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "ListJobs",
      requestType = exportd.v1.ListJobsRequest.class,
      responseType = exportd.v1.ListJobsResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.ListJobsRequest,
      exportd.v1.ListJobsResponse> getListJobsMethod() {
    io.grpc.MethodDescriptor<exportd.v1.ListJobsRequest, exportd.v1.ListJobsResponse> getListJobsMethod;
    if ((getListJobsMethod = ExportServiceGrpc.getListJobsMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getListJobsMethod = ExportServiceGrpc.getListJobsMethod) == null) {
          ExportServiceGrpc.getListJobsMethod = getListJobsMethod =
              io.grpc.MethodDescriptor.<exportd.v1.ListJobsRequest, exportd.v1.ListJobsResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "ListJobs"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListJobsRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListJobsResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("ListJobs"))
              .build();
        }
      }
    }
    return getListJobsMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.WatchJobRequest,
      exportd.v1.WatchJobResponse> getWatchJobMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "WatchJob",
      requestType = exportd.v1.WatchJobRequest.class,
      responseType = exportd.v1.WatchJobResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
  public static io.grpc.MethodDescriptor<exportd.v1.WatchJobRequest,
      exportd.v1.WatchJobResponse> getWatchJobMethod() {
    io.grpc.MethodDescriptor<exportd.v1.WatchJobRequest, exportd.v1.WatchJobResponse> getWatchJobMethod;
    if ((getWatchJobMethod = ExportServiceGrpc.getWatchJobMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getWatchJobMethod = ExportServiceGrpc.getWatchJobMethod) == null) {
          ExportServiceGrpc.getWatchJobMethod = getWatchJobMethod =
              io.grpc.MethodDescriptor.<exportd.v1.WatchJobRequest, exportd.v1.WatchJobResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "WatchJob"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.WatchJobRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.WatchJobResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("WatchJob"))
              .build();
        }
      }
    }
    return getWatchJobMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.CancelJobRequest,
      exportd.v1.CancelJobResponse> getCancelJobMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "CancelJob",
      requestType = exportd.v1.CancelJobRequest.class,
      responseType = exportd.v1.CancelJobResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.CancelJobRequest,
      exportd.v1.CancelJobResponse> getCancelJobMethod() {
    io.grpc.MethodDescriptor<exportd.v1.CancelJobRequest, exportd.v1.CancelJobResponse> getCancelJobMethod;
    if ((getCancelJobMethod = ExportServiceGrpc.getCancelJobMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getCancelJobMethod = ExportServiceGrpc.getCancelJobMethod) == null) {
          ExportServiceGrpc.getCancelJobMethod = getCancelJobMethod =
              io.grpc.MethodDescriptor.<exportd.v1.CancelJobRequest, exportd.v1.CancelJobResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "CancelJob"))
              .setIdempotent(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.CancelJobRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.CancelJobResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("CancelJob"))
              .build();
        }
      }
    }
    return getCancelJobMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.DeleteJobRequest,
      exportd.v1.DeleteJobResponse> getDeleteJobMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "DeleteJob",
      requestType = exportd.v1.DeleteJobRequest.class,
      responseType = exportd.v1.DeleteJobResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.DeleteJobRequest,
      exportd.v1.DeleteJobResponse> getDeleteJobMethod() {
    io.grpc.MethodDescriptor<exportd.v1.DeleteJobRequest, exportd.v1.DeleteJobResponse> getDeleteJobMethod;
    if ((getDeleteJobMethod = ExportServiceGrpc.getDeleteJobMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getDeleteJobMethod = ExportServiceGrpc.getDeleteJobMethod) == null) {
          ExportServiceGrpc.getDeleteJobMethod = getDeleteJobMethod =
              io.grpc.MethodDescriptor.<exportd.v1.DeleteJobRequest, exportd.v1.DeleteJobResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "DeleteJob"))
              .setIdempotent(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.DeleteJobRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.DeleteJobResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("DeleteJob"))
              .build();
        }
      }
    }
    return getDeleteJobMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.StreamDownloadRequest,
      exportd.v1.StreamDownloadResponse> getStreamDownloadMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "StreamDownload",
      requestType = exportd.v1.StreamDownloadRequest.class,
      responseType = exportd.v1.StreamDownloadResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
  public static io.grpc.MethodDescriptor<exportd.v1.StreamDownloadRequest,
      exportd.v1.StreamDownloadResponse> getStreamDownloadMethod() {
    io.grpc.MethodDescriptor<exportd.v1.StreamDownloadRequest, exportd.v1.StreamDownloadResponse> getStreamDownloadMethod;
    if ((getStreamDownloadMethod = ExportServiceGrpc.getStreamDownloadMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getStreamDownloadMethod = ExportServiceGrpc.getStreamDownloadMethod) == null) {
          ExportServiceGrpc.getStreamDownloadMethod = getStreamDownloadMethod =
              io.grpc.MethodDescriptor.<exportd.v1.StreamDownloadRequest, exportd.v1.StreamDownloadResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "StreamDownload"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.StreamDownloadRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.StreamDownloadResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("StreamDownload"))
              .build();
        }
      }
    }
    return getStreamDownloadMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.GetDownloadUrlsRequest,
      exportd.v1.GetDownloadUrlsResponse> getGetDownloadUrlsMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "GetDownloadUrls",
      requestType = exportd.v1.GetDownloadUrlsRequest.class,
      responseType = exportd.v1.GetDownloadUrlsResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.GetDownloadUrlsRequest,
      exportd.v1.GetDownloadUrlsResponse> getGetDownloadUrlsMethod() {
    io.grpc.MethodDescriptor<exportd.v1.GetDownloadUrlsRequest, exportd.v1.GetDownloadUrlsResponse> getGetDownloadUrlsMethod;
    if ((getGetDownloadUrlsMethod = ExportServiceGrpc.getGetDownloadUrlsMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getGetDownloadUrlsMethod = ExportServiceGrpc.getGetDownloadUrlsMethod) == null) {
          ExportServiceGrpc.getGetDownloadUrlsMethod = getGetDownloadUrlsMethod =
              io.grpc.MethodDescriptor.<exportd.v1.GetDownloadUrlsRequest, exportd.v1.GetDownloadUrlsResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "GetDownloadUrls"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.GetDownloadUrlsRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.GetDownloadUrlsResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("GetDownloadUrls"))
              .build();
        }
      }
    }
    return getGetDownloadUrlsMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.ListDeliveriesRequest,
      exportd.v1.ListDeliveriesResponse> getListDeliveriesMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "ListDeliveries",
      requestType = exportd.v1.ListDeliveriesRequest.class,
      responseType = exportd.v1.ListDeliveriesResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.ListDeliveriesRequest,
      exportd.v1.ListDeliveriesResponse> getListDeliveriesMethod() {
    io.grpc.MethodDescriptor<exportd.v1.ListDeliveriesRequest, exportd.v1.ListDeliveriesResponse> getListDeliveriesMethod;
    if ((getListDeliveriesMethod = ExportServiceGrpc.getListDeliveriesMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getListDeliveriesMethod = ExportServiceGrpc.getListDeliveriesMethod) == null) {
          ExportServiceGrpc.getListDeliveriesMethod = getListDeliveriesMethod =
              io.grpc.MethodDescriptor.<exportd.v1.ListDeliveriesRequest, exportd.v1.ListDeliveriesResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "ListDeliveries"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListDeliveriesRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListDeliveriesResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("ListDeliveries"))
              .build();
        }
      }
    }
    return getListDeliveriesMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.RedriveDeliveriesRequest,
      exportd.v1.RedriveDeliveriesResponse> getRedriveDeliveriesMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "RedriveDeliveries",
      requestType = exportd.v1.RedriveDeliveriesRequest.class,
      responseType = exportd.v1.RedriveDeliveriesResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.RedriveDeliveriesRequest,
      exportd.v1.RedriveDeliveriesResponse> getRedriveDeliveriesMethod() {
    io.grpc.MethodDescriptor<exportd.v1.RedriveDeliveriesRequest, exportd.v1.RedriveDeliveriesResponse> getRedriveDeliveriesMethod;
    if ((getRedriveDeliveriesMethod = ExportServiceGrpc.getRedriveDeliveriesMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getRedriveDeliveriesMethod = ExportServiceGrpc.getRedriveDeliveriesMethod) == null) {
          ExportServiceGrpc.getRedriveDeliveriesMethod = getRedriveDeliveriesMethod =
              io.grpc.MethodDescriptor.<exportd.v1.RedriveDeliveriesRequest, exportd.v1.RedriveDeliveriesResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "RedriveDeliveries"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.RedriveDeliveriesRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.RedriveDeliveriesResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("RedriveDeliveries"))
              .build();
        }
      }
    }
    return getRedriveDeliveriesMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.ListSinkQueuesRequest,
      exportd.v1.ListSinkQueuesResponse> getListSinkQueuesMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "ListSinkQueues",
      requestType = exportd.v1.ListSinkQueuesRequest.class,
      responseType = exportd.v1.ListSinkQueuesResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.ListSinkQueuesRequest,
      exportd.v1.ListSinkQueuesResponse> getListSinkQueuesMethod() {
    io.grpc.MethodDescriptor<exportd.v1.ListSinkQueuesRequest, exportd.v1.ListSinkQueuesResponse> getListSinkQueuesMethod;
    if ((getListSinkQueuesMethod = ExportServiceGrpc.getListSinkQueuesMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getListSinkQueuesMethod = ExportServiceGrpc.getListSinkQueuesMethod) == null) {
          ExportServiceGrpc.getListSinkQueuesMethod = getListSinkQueuesMethod =
              io.grpc.MethodDescriptor.<exportd.v1.ListSinkQueuesRequest, exportd.v1.ListSinkQueuesResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "ListSinkQueues"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListSinkQueuesRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListSinkQueuesResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("ListSinkQueues"))
              .build();
        }
      }
    }
    return getListSinkQueuesMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.EnableSinkQueueRequest,
      exportd.v1.EnableSinkQueueResponse> getEnableSinkQueueMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "EnableSinkQueue",
      requestType = exportd.v1.EnableSinkQueueRequest.class,
      responseType = exportd.v1.EnableSinkQueueResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.EnableSinkQueueRequest,
      exportd.v1.EnableSinkQueueResponse> getEnableSinkQueueMethod() {
    io.grpc.MethodDescriptor<exportd.v1.EnableSinkQueueRequest, exportd.v1.EnableSinkQueueResponse> getEnableSinkQueueMethod;
    if ((getEnableSinkQueueMethod = ExportServiceGrpc.getEnableSinkQueueMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getEnableSinkQueueMethod = ExportServiceGrpc.getEnableSinkQueueMethod) == null) {
          ExportServiceGrpc.getEnableSinkQueueMethod = getEnableSinkQueueMethod =
              io.grpc.MethodDescriptor.<exportd.v1.EnableSinkQueueRequest, exportd.v1.EnableSinkQueueResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "EnableSinkQueue"))
              .setIdempotent(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.EnableSinkQueueRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.EnableSinkQueueResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("EnableSinkQueue"))
              .build();
        }
      }
    }
    return getEnableSinkQueueMethod;
  }

  private static volatile io.grpc.MethodDescriptor<exportd.v1.ListAuditRecordsRequest,
      exportd.v1.ListAuditRecordsResponse> getListAuditRecordsMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "ListAuditRecords",
      requestType = exportd.v1.ListAuditRecordsRequest.class,
      responseType = exportd.v1.ListAuditRecordsResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<exportd.v1.ListAuditRecordsRequest,
      exportd.v1.ListAuditRecordsResponse> getListAuditRecordsMethod() {
    io.grpc.MethodDescriptor<exportd.v1.ListAuditRecordsRequest, exportd.v1.ListAuditRecordsResponse> getListAuditRecordsMethod;
    if ((getListAuditRecordsMethod = ExportServiceGrpc.getListAuditRecordsMethod) == null) {
      synchronized (ExportServiceGrpc.class) {
        if ((getListAuditRecordsMethod = ExportServiceGrpc.getListAuditRecordsMethod) == null) {
          ExportServiceGrpc.getListAuditRecordsMethod = getListAuditRecordsMethod =
              io.grpc.MethodDescriptor.<exportd.v1.ListAuditRecordsRequest, exportd.v1.ListAuditRecordsResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "ListAuditRecords"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListAuditRecordsRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  exportd.v1.ListAuditRecordsResponse.getDefaultInstance()))
              .setSchemaDescriptor(new ExportServiceMethodDescriptorSupplier("ListAuditRecords"))
              .build();
        }
      }
    }
    return getListAuditRecordsMethod;
  }

  /**
   * Creates a new async stub that supports all call types for the service
   */
  public static ExportServiceStub newStub(io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ExportServiceStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ExportServiceStub>() {
        @java.lang.Override
        public ExportServiceStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ExportServiceStub(channel, callOptions);
        }
      };
    return ExportServiceStub.newStub(factory, channel);
  }

  /**
   * Creates a new blocking-style stub that supports all types of calls on the service
   */
  public static ExportServiceBlockingV2Stub newBlockingV2Stub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ExportServiceBlockingV2Stub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ExportServiceBlockingV2Stub>() {
        @java.lang.Override
        public ExportServiceBlockingV2Stub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ExportServiceBlockingV2Stub(channel, callOptions);
        }
      };
    return ExportServiceBlockingV2Stub.newStub(factory, channel);
  }

  /**
   * Creates a new blocking-style stub that supports unary and streaming output calls on the service
   */
  public static ExportServiceBlockingStub newBlockingStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ExportServiceBlockingStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ExportServiceBlockingStub>() {
        @java.lang.Override
        public ExportServiceBlockingStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ExportServiceBlockingStub(channel, callOptions);
        }
      };
    return ExportServiceBlockingStub.newStub(factory, channel);
  }

  /**
   * Creates a new ListenableFuture-style stub that supports unary calls on the service
   */
  public static ExportServiceFutureStub newFutureStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<ExportServiceFutureStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<ExportServiceFutureStub>() {
        @java.lang.Override
        public ExportServiceFutureStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new ExportServiceFutureStub(channel, callOptions);
        }
      };
    return ExportServiceFutureStub.newStub(factory, channel);
  }

  /**
   * <pre>
   * Runs dataset exports as background jobs.
   * Every error carries `google.rpc.ErrorInfo` with domain `exportd` and a reason from
   * `ErrorReason`. Any method may answer UNAVAILABLE while the server shuts down, and
   * INTERNAL with a reference that the operator can look up.
   * Where the server wants to know who calls, credentials travel as metadata
   * `authorization: Bearer &lt;API key or token&gt;`, or as a client certificate. They say whose
   * jobs the caller sees and what it may do: scope `exports.read` for the methods that
   * only read, `exports.write` for CreateExport, CancelJob, DeleteJob, RedriveDeliveries
   * and EnableSinkQueue; `admin` is both, and ListAuditRecords, which tells of all tenants.
   * Any method may answer UNAUTHENTICATED, PERMISSION_DENIED with the scope that is
   * missing, and RESOURCE_EXHAUSTED `QUOTA_EXCEEDED` when the caller's tenant asks too often
   * or has too many calls open.
   * </pre>
   */
  public interface AsyncService {

    /**
     * <pre>
     * Lists the datasets that the caller may see, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    default void listDatasets(exportd.v1.ListDatasetsRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListDatasetsResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getListDatasetsMethod(), responseObserver);
    }

    /**
     * <pre>
     * Describes one dataset.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `DATASET_NOT_FOUND`.
     * </pre>
     */
    default void getDataset(exportd.v1.GetDatasetRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.GetDatasetResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getGetDatasetMethod(), responseObserver);
    }

    /**
     * <pre>
     * Checks a request, records it and answers with the job, which then runs in the
     * background.
     * With a `request_id` a repeated call is safe: the same payload answers with the job
     * that the first call made. Errors: INVALID_ARGUMENT with one violation for each bad
     * field; NOT_FOUND `DATASET_NOT_FOUND`; FAILED_PRECONDITION
     * `DATASET_NOT_EXPORTABLE`, `ENDPOINT_DISABLED` for a sink's; ALREADY_EXISTS
     * `REQUEST_ID_CONFLICT`; RESOURCE_EXHAUSTED `QUOTA_EXCEEDED`.
     * </pre>
     */
    default void createExport(exportd.v1.CreateExportRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.CreateExportResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getCreateExportMethod(), responseObserver);
    }

    /**
     * <pre>
     * Tells where a job stands.
     * Errors: INVALID_ARGUMENT for a `job_id` that is no UUID; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    default void getJob(exportd.v1.GetJobRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.GetJobResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getGetJobMethod(), responseObserver);
    }

    /**
     * <pre>
     * Lists the caller's jobs, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token.
     * </pre>
     */
    default void listJobs(exportd.v1.ListJobsRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListJobsResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getListJobsMethod(), responseObserver);
    }

    /**
     * <pre>
     * Sends the job now, at every change and at least every few seconds, and ends after
     * the message with a final state.
     * Errors: as GetJob; NOT_FOUND also when the job is deleted meanwhile.
     * </pre>
     */
    default void watchJob(exportd.v1.WatchJobRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.WatchJobResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getWatchJobMethod(), responseObserver);
    }

    /**
     * <pre>
     * Cancels a job. Its output is refused at once and deleted. Cancelling twice, or a
     * job that has ended, changes nothing and says so.
     * Errors: as GetJob.
     * </pre>
     */
    default void cancelJob(exportd.v1.CancelJobRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.CancelJobResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getCancelJobMethod(), responseObserver);
    }

    /**
     * <pre>
     * Deletes the output of a job that has ended, and the job itself.
     * Errors: as GetJob; FAILED_PRECONDITION `JOB_NOT_FINISHED`: cancel it first.
     * </pre>
     */
    default void deleteJob(exportd.v1.DeleteJobRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.DeleteJobResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getDeleteJobMethod(), responseObserver);
    }

    /**
     * <pre>
     * Streams a finished output, whole or one part. The first message carries `metadata`
     * and no data; the others carry data in order.
     * Offsets count stored bytes, compression included. Reading from exactly the end
     * gives no data and no error. Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`,
     * `PART_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_NOT_FINISHED`, `JOB_FAILED`, `JOB_CANCELLED`, `GENERATION_MISMATCH`,
     * `PARTS_NOT_JOINABLE`; OUT_OF_RANGE `OFFSET_OUT_OF_RANGE`; RESOURCE_EXHAUSTED `READER_STALLED`; DATA_LOSS
     * `CHECKSUM_MISMATCH`.
     * </pre>
     */
    default void streamDownload(exportd.v1.StreamDownloadRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.StreamDownloadResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getStreamDownloadMethod(), responseObserver);
    }

    /**
     * <pre>
     * Gives URLs that a browser or any HTTP client can download a finished output by,
     * without calling this service: one for each part, in order.
     * Who has such a URL has the data until it expires, so pass it on with care. It dies
     * with the output: at `expire_time` of the job, or when the job is deleted. Errors:
     * INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `PART_NOT_FOUND`, `OUTPUT_EXPIRED`,
     * `OUTPUT_DROPPED`; FAILED_PRECONDITION `JOB_NOT_FINISHED`, `JOB_FAILED`,
     * `JOB_CANCELLED`, `DOWNLOAD_URLS_UNAVAILABLE`; UNAVAILABLE `STORE_FAILED`.
     * </pre>
     */
    default void getDownloadUrls(exportd.v1.GetDownloadUrlsRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.GetDownloadUrlsResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getGetDownloadUrlsMethod(), responseObserver);
    }

    /**
     * <pre>
     * Lists deliveries to sinks, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    default void listDeliveries(exportd.v1.ListDeliveriesRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListDeliveriesResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getListDeliveriesMethod(), responseObserver);
    }

    /**
     * <pre>
     * Sends deliveries again that failed for good or were dropped, without exporting
     * again. What is waiting to be tried again is tried now.
     * Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `DELIVERY_NOT_FOUND`,
     * `SINK_QUEUE_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_FAILED`, `JOB_CANCELLED`, `ENDPOINT_DISABLED`.
     * </pre>
     */
    default void redriveDeliveries(exportd.v1.RedriveDeliveriesRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.RedriveDeliveriesResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getRedriveDeliveriesMethod(), responseObserver);
    }

    /**
     * <pre>
     * Lists the queues that the caller's deliveries stand in, or stood in, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    default void listSinkQueues(exportd.v1.ListSinkQueuesRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListSinkQueuesResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getListSinkQueuesMethod(), responseObserver);
    }

    /**
     * <pre>
     * Lets deliveries to a disabled endpoint go on. Those that were dead-lettered stay so
     * until they are redriven. An enabled one stays as it is.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `SINK_QUEUE_NOT_FOUND`.
     * </pre>
     */
    default void enableSinkQueue(exportd.v1.EnableSinkQueueRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.EnableSinkQueueResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getEnableSinkQueueMethod(), responseObserver);
    }

    /**
     * <pre>
     * Lists who did what, newest first: of every tenant, for those who run the service.
     * Needs scope `admin`. A record appears within a moment of the end of what it tells.
     * Errors: INVALID_ARGUMENT for a bad condition, page size or token.
     * </pre>
     */
    default void listAuditRecords(exportd.v1.ListAuditRecordsRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListAuditRecordsResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getListAuditRecordsMethod(), responseObserver);
    }
  }

  /**
   * Base class for the server implementation of the service ExportService.
   * <pre>
   * Runs dataset exports as background jobs.
   * Every error carries `google.rpc.ErrorInfo` with domain `exportd` and a reason from
   * `ErrorReason`. Any method may answer UNAVAILABLE while the server shuts down, and
   * INTERNAL with a reference that the operator can look up.
   * Where the server wants to know who calls, credentials travel as metadata
   * `authorization: Bearer &lt;API key or token&gt;`, or as a client certificate. They say whose
   * jobs the caller sees and what it may do: scope `exports.read` for the methods that
   * only read, `exports.write` for CreateExport, CancelJob, DeleteJob, RedriveDeliveries
   * and EnableSinkQueue; `admin` is both, and ListAuditRecords, which tells of all tenants.
   * Any method may answer UNAUTHENTICATED, PERMISSION_DENIED with the scope that is
   * missing, and RESOURCE_EXHAUSTED `QUOTA_EXCEEDED` when the caller's tenant asks too often
   * or has too many calls open.
   * </pre>
   */
  public static abstract class ExportServiceImplBase
      implements io.grpc.BindableService, AsyncService {

    @java.lang.Override public final io.grpc.ServerServiceDefinition bindService() {
      return ExportServiceGrpc.bindService(this);
    }
  }

  /**
   * A stub to allow clients to do asynchronous rpc calls to service ExportService.
   * <pre>
   * Runs dataset exports as background jobs.
   * Every error carries `google.rpc.ErrorInfo` with domain `exportd` and a reason from
   * `ErrorReason`. Any method may answer UNAVAILABLE while the server shuts down, and
   * INTERNAL with a reference that the operator can look up.
   * Where the server wants to know who calls, credentials travel as metadata
   * `authorization: Bearer &lt;API key or token&gt;`, or as a client certificate. They say whose
   * jobs the caller sees and what it may do: scope `exports.read` for the methods that
   * only read, `exports.write` for CreateExport, CancelJob, DeleteJob, RedriveDeliveries
   * and EnableSinkQueue; `admin` is both, and ListAuditRecords, which tells of all tenants.
   * Any method may answer UNAUTHENTICATED, PERMISSION_DENIED with the scope that is
   * missing, and RESOURCE_EXHAUSTED `QUOTA_EXCEEDED` when the caller's tenant asks too often
   * or has too many calls open.
   * </pre>
   */
  public static final class ExportServiceStub
      extends io.grpc.stub.AbstractAsyncStub<ExportServiceStub> {
    private ExportServiceStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ExportServiceStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ExportServiceStub(channel, callOptions);
    }

    /**
     * <pre>
     * Lists the datasets that the caller may see, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    public void listDatasets(exportd.v1.ListDatasetsRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListDatasetsResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getListDatasetsMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Describes one dataset.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `DATASET_NOT_FOUND`.
     * </pre>
     */
    public void getDataset(exportd.v1.GetDatasetRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.GetDatasetResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getGetDatasetMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Checks a request, records it and answers with the job, which then runs in the
     * background.
     * With a `request_id` a repeated call is safe: the same payload answers with the job
     * that the first call made. Errors: INVALID_ARGUMENT with one violation for each bad
     * field; NOT_FOUND `DATASET_NOT_FOUND`; FAILED_PRECONDITION
     * `DATASET_NOT_EXPORTABLE`, `ENDPOINT_DISABLED` for a sink's; ALREADY_EXISTS
     * `REQUEST_ID_CONFLICT`; RESOURCE_EXHAUSTED `QUOTA_EXCEEDED`.
     * </pre>
     */
    public void createExport(exportd.v1.CreateExportRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.CreateExportResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getCreateExportMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Tells where a job stands.
     * Errors: INVALID_ARGUMENT for a `job_id` that is no UUID; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    public void getJob(exportd.v1.GetJobRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.GetJobResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getGetJobMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Lists the caller's jobs, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token.
     * </pre>
     */
    public void listJobs(exportd.v1.ListJobsRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListJobsResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getListJobsMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Sends the job now, at every change and at least every few seconds, and ends after
     * the message with a final state.
     * Errors: as GetJob; NOT_FOUND also when the job is deleted meanwhile.
     * </pre>
     */
    public void watchJob(exportd.v1.WatchJobRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.WatchJobResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncServerStreamingCall(
          getChannel().newCall(getWatchJobMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Cancels a job. Its output is refused at once and deleted. Cancelling twice, or a
     * job that has ended, changes nothing and says so.
     * Errors: as GetJob.
     * </pre>
     */
    public void cancelJob(exportd.v1.CancelJobRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.CancelJobResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getCancelJobMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Deletes the output of a job that has ended, and the job itself.
     * Errors: as GetJob; FAILED_PRECONDITION `JOB_NOT_FINISHED`: cancel it first.
     * </pre>
     */
    public void deleteJob(exportd.v1.DeleteJobRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.DeleteJobResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getDeleteJobMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Streams a finished output, whole or one part. The first message carries `metadata`
     * and no data; the others carry data in order.
     * Offsets count stored bytes, compression included. Reading from exactly the end
     * gives no data and no error. Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`,
     * `PART_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_NOT_FINISHED`, `JOB_FAILED`, `JOB_CANCELLED`, `GENERATION_MISMATCH`,
     * `PARTS_NOT_JOINABLE`; OUT_OF_RANGE `OFFSET_OUT_OF_RANGE`; RESOURCE_EXHAUSTED `READER_STALLED`; DATA_LOSS
     * `CHECKSUM_MISMATCH`.
     * </pre>
     */
    public void streamDownload(exportd.v1.StreamDownloadRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.StreamDownloadResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncServerStreamingCall(
          getChannel().newCall(getStreamDownloadMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Gives URLs that a browser or any HTTP client can download a finished output by,
     * without calling this service: one for each part, in order.
     * Who has such a URL has the data until it expires, so pass it on with care. It dies
     * with the output: at `expire_time` of the job, or when the job is deleted. Errors:
     * INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `PART_NOT_FOUND`, `OUTPUT_EXPIRED`,
     * `OUTPUT_DROPPED`; FAILED_PRECONDITION `JOB_NOT_FINISHED`, `JOB_FAILED`,
     * `JOB_CANCELLED`, `DOWNLOAD_URLS_UNAVAILABLE`; UNAVAILABLE `STORE_FAILED`.
     * </pre>
     */
    public void getDownloadUrls(exportd.v1.GetDownloadUrlsRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.GetDownloadUrlsResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getGetDownloadUrlsMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Lists deliveries to sinks, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    public void listDeliveries(exportd.v1.ListDeliveriesRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListDeliveriesResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getListDeliveriesMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Sends deliveries again that failed for good or were dropped, without exporting
     * again. What is waiting to be tried again is tried now.
     * Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `DELIVERY_NOT_FOUND`,
     * `SINK_QUEUE_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_FAILED`, `JOB_CANCELLED`, `ENDPOINT_DISABLED`.
     * </pre>
     */
    public void redriveDeliveries(exportd.v1.RedriveDeliveriesRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.RedriveDeliveriesResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getRedriveDeliveriesMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Lists the queues that the caller's deliveries stand in, or stood in, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    public void listSinkQueues(exportd.v1.ListSinkQueuesRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListSinkQueuesResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getListSinkQueuesMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Lets deliveries to a disabled endpoint go on. Those that were dead-lettered stay so
     * until they are redriven. An enabled one stays as it is.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `SINK_QUEUE_NOT_FOUND`.
     * </pre>
     */
    public void enableSinkQueue(exportd.v1.EnableSinkQueueRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.EnableSinkQueueResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getEnableSinkQueueMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Lists who did what, newest first: of every tenant, for those who run the service.
     * Needs scope `admin`. A record appears within a moment of the end of what it tells.
     * Errors: INVALID_ARGUMENT for a bad condition, page size or token.
     * </pre>
     */
    public void listAuditRecords(exportd.v1.ListAuditRecordsRequest request,
        io.grpc.stub.StreamObserver<exportd.v1.ListAuditRecordsResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getListAuditRecordsMethod(), getCallOptions()), request, responseObserver);
    }
  }

  /**
   * A stub to allow clients to do synchronous rpc calls to service ExportService.
   * <pre>
   * Runs dataset exports as background jobs.
   * Every error carries `google.rpc.ErrorInfo` with domain `exportd` and a reason from
   * `ErrorReason`. Any method may answer UNAVAILABLE while the server shuts down, and
   * INTERNAL with a reference that the operator can look up.
   * Where the server wants to know who calls, credentials travel as metadata
   * `authorization: Bearer &lt;API key or token&gt;`, or as a client certificate. They say whose
   * jobs the caller sees and what it may do: scope `exports.read` for the methods that
   * only read, `exports.write` for CreateExport, CancelJob, DeleteJob, RedriveDeliveries
   * and EnableSinkQueue; `admin` is both, and ListAuditRecords, which tells of all tenants.
   * Any method may answer UNAUTHENTICATED, PERMISSION_DENIED with the scope that is
   * missing, and RESOURCE_EXHAUSTED `QUOTA_EXCEEDED` when the caller's tenant asks too often
   * or has too many calls open.
   * </pre>
   */
  public static final class ExportServiceBlockingV2Stub
      extends io.grpc.stub.AbstractBlockingStub<ExportServiceBlockingV2Stub> {
    private ExportServiceBlockingV2Stub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ExportServiceBlockingV2Stub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ExportServiceBlockingV2Stub(channel, callOptions);
    }

    /**
     * <pre>
     * Lists the datasets that the caller may see, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    public exportd.v1.ListDatasetsResponse listDatasets(exportd.v1.ListDatasetsRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getListDatasetsMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Describes one dataset.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `DATASET_NOT_FOUND`.
     * </pre>
     */
    public exportd.v1.GetDatasetResponse getDataset(exportd.v1.GetDatasetRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getGetDatasetMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Checks a request, records it and answers with the job, which then runs in the
     * background.
     * With a `request_id` a repeated call is safe: the same payload answers with the job
     * that the first call made. Errors: INVALID_ARGUMENT with one violation for each bad
     * field; NOT_FOUND `DATASET_NOT_FOUND`; FAILED_PRECONDITION
     * `DATASET_NOT_EXPORTABLE`, `ENDPOINT_DISABLED` for a sink's; ALREADY_EXISTS
     * `REQUEST_ID_CONFLICT`; RESOURCE_EXHAUSTED `QUOTA_EXCEEDED`.
     * </pre>
     */
    public exportd.v1.CreateExportResponse createExport(exportd.v1.CreateExportRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getCreateExportMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Tells where a job stands.
     * Errors: INVALID_ARGUMENT for a `job_id` that is no UUID; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    public exportd.v1.GetJobResponse getJob(exportd.v1.GetJobRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getGetJobMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists the caller's jobs, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token.
     * </pre>
     */
    public exportd.v1.ListJobsResponse listJobs(exportd.v1.ListJobsRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getListJobsMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Sends the job now, at every change and at least every few seconds, and ends after
     * the message with a final state.
     * Errors: as GetJob; NOT_FOUND also when the job is deleted meanwhile.
     * </pre>
     */
    @io.grpc.ExperimentalApi("https://github.com/grpc/grpc-java/issues/10918")
    public io.grpc.stub.BlockingClientCall<?, exportd.v1.WatchJobResponse>
        watchJob(exportd.v1.WatchJobRequest request) {
      return io.grpc.stub.ClientCalls.blockingV2ServerStreamingCall(
          getChannel(), getWatchJobMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Cancels a job. Its output is refused at once and deleted. Cancelling twice, or a
     * job that has ended, changes nothing and says so.
     * Errors: as GetJob.
     * </pre>
     */
    public exportd.v1.CancelJobResponse cancelJob(exportd.v1.CancelJobRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getCancelJobMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Deletes the output of a job that has ended, and the job itself.
     * Errors: as GetJob; FAILED_PRECONDITION `JOB_NOT_FINISHED`: cancel it first.
     * </pre>
     */
    public exportd.v1.DeleteJobResponse deleteJob(exportd.v1.DeleteJobRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getDeleteJobMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Streams a finished output, whole or one part. The first message carries `metadata`
     * and no data; the others carry data in order.
     * Offsets count stored bytes, compression included. Reading from exactly the end
     * gives no data and no error. Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`,
     * `PART_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_NOT_FINISHED`, `JOB_FAILED`, `JOB_CANCELLED`, `GENERATION_MISMATCH`,
     * `PARTS_NOT_JOINABLE`; OUT_OF_RANGE `OFFSET_OUT_OF_RANGE`; RESOURCE_EXHAUSTED `READER_STALLED`; DATA_LOSS
     * `CHECKSUM_MISMATCH`.
     * </pre>
     */
    @io.grpc.ExperimentalApi("https://github.com/grpc/grpc-java/issues/10918")
    public io.grpc.stub.BlockingClientCall<?, exportd.v1.StreamDownloadResponse>
        streamDownload(exportd.v1.StreamDownloadRequest request) {
      return io.grpc.stub.ClientCalls.blockingV2ServerStreamingCall(
          getChannel(), getStreamDownloadMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Gives URLs that a browser or any HTTP client can download a finished output by,
     * without calling this service: one for each part, in order.
     * Who has such a URL has the data until it expires, so pass it on with care. It dies
     * with the output: at `expire_time` of the job, or when the job is deleted. Errors:
     * INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `PART_NOT_FOUND`, `OUTPUT_EXPIRED`,
     * `OUTPUT_DROPPED`; FAILED_PRECONDITION `JOB_NOT_FINISHED`, `JOB_FAILED`,
     * `JOB_CANCELLED`, `DOWNLOAD_URLS_UNAVAILABLE`; UNAVAILABLE `STORE_FAILED`.
     * </pre>
     */
    public exportd.v1.GetDownloadUrlsResponse getDownloadUrls(exportd.v1.GetDownloadUrlsRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getGetDownloadUrlsMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists deliveries to sinks, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    public exportd.v1.ListDeliveriesResponse listDeliveries(exportd.v1.ListDeliveriesRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getListDeliveriesMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Sends deliveries again that failed for good or were dropped, without exporting
     * again. What is waiting to be tried again is tried now.
     * Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `DELIVERY_NOT_FOUND`,
     * `SINK_QUEUE_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_FAILED`, `JOB_CANCELLED`, `ENDPOINT_DISABLED`.
     * </pre>
     */
    public exportd.v1.RedriveDeliveriesResponse redriveDeliveries(exportd.v1.RedriveDeliveriesRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getRedriveDeliveriesMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists the queues that the caller's deliveries stand in, or stood in, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    public exportd.v1.ListSinkQueuesResponse listSinkQueues(exportd.v1.ListSinkQueuesRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getListSinkQueuesMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lets deliveries to a disabled endpoint go on. Those that were dead-lettered stay so
     * until they are redriven. An enabled one stays as it is.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `SINK_QUEUE_NOT_FOUND`.
     * </pre>
     */
    public exportd.v1.EnableSinkQueueResponse enableSinkQueue(exportd.v1.EnableSinkQueueRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getEnableSinkQueueMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists who did what, newest first: of every tenant, for those who run the service.
     * Needs scope `admin`. A record appears within a moment of the end of what it tells.
     * Errors: INVALID_ARGUMENT for a bad condition, page size or token.
     * </pre>
     */
    public exportd.v1.ListAuditRecordsResponse listAuditRecords(exportd.v1.ListAuditRecordsRequest request) throws io.grpc.StatusException {
      return io.grpc.stub.ClientCalls.blockingV2UnaryCall(
          getChannel(), getListAuditRecordsMethod(), getCallOptions(), request);
    }
  }

  /**
   * A stub to allow clients to do limited synchronous rpc calls to service ExportService.
   * <pre>
   * Runs dataset exports as background jobs.
   * Every error carries `google.rpc.ErrorInfo` with domain `exportd` and a reason from
   * `ErrorReason`. Any method may answer UNAVAILABLE while the server shuts down, and
   * INTERNAL with a reference that the operator can look up.
   * Where the server wants to know who calls, credentials travel as metadata
   * `authorization: Bearer &lt;API key or token&gt;`, or as a client certificate. They say whose
   * jobs the caller sees and what it may do: scope `exports.read` for the methods that
   * only read, `exports.write` for CreateExport, CancelJob, DeleteJob, RedriveDeliveries
   * and EnableSinkQueue; `admin` is both, and ListAuditRecords, which tells of all tenants.
   * Any method may answer UNAUTHENTICATED, PERMISSION_DENIED with the scope that is
   * missing, and RESOURCE_EXHAUSTED `QUOTA_EXCEEDED` when the caller's tenant asks too often
   * or has too many calls open.
   * </pre>
   */
  public static final class ExportServiceBlockingStub
      extends io.grpc.stub.AbstractBlockingStub<ExportServiceBlockingStub> {
    private ExportServiceBlockingStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ExportServiceBlockingStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ExportServiceBlockingStub(channel, callOptions);
    }

    /**
     * <pre>
     * Lists the datasets that the caller may see, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    public exportd.v1.ListDatasetsResponse listDatasets(exportd.v1.ListDatasetsRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getListDatasetsMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Describes one dataset.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `DATASET_NOT_FOUND`.
     * </pre>
     */
    public exportd.v1.GetDatasetResponse getDataset(exportd.v1.GetDatasetRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getGetDatasetMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Checks a request, records it and answers with the job, which then runs in the
     * background.
     * With a `request_id` a repeated call is safe: the same payload answers with the job
     * that the first call made. Errors: INVALID_ARGUMENT with one violation for each bad
     * field; NOT_FOUND `DATASET_NOT_FOUND`; FAILED_PRECONDITION
     * `DATASET_NOT_EXPORTABLE`, `ENDPOINT_DISABLED` for a sink's; ALREADY_EXISTS
     * `REQUEST_ID_CONFLICT`; RESOURCE_EXHAUSTED `QUOTA_EXCEEDED`.
     * </pre>
     */
    public exportd.v1.CreateExportResponse createExport(exportd.v1.CreateExportRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getCreateExportMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Tells where a job stands.
     * Errors: INVALID_ARGUMENT for a `job_id` that is no UUID; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    public exportd.v1.GetJobResponse getJob(exportd.v1.GetJobRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getGetJobMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists the caller's jobs, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token.
     * </pre>
     */
    public exportd.v1.ListJobsResponse listJobs(exportd.v1.ListJobsRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getListJobsMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Sends the job now, at every change and at least every few seconds, and ends after
     * the message with a final state.
     * Errors: as GetJob; NOT_FOUND also when the job is deleted meanwhile.
     * </pre>
     */
    public java.util.Iterator<exportd.v1.WatchJobResponse> watchJob(
        exportd.v1.WatchJobRequest request) {
      return io.grpc.stub.ClientCalls.blockingServerStreamingCall(
          getChannel(), getWatchJobMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Cancels a job. Its output is refused at once and deleted. Cancelling twice, or a
     * job that has ended, changes nothing and says so.
     * Errors: as GetJob.
     * </pre>
     */
    public exportd.v1.CancelJobResponse cancelJob(exportd.v1.CancelJobRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getCancelJobMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Deletes the output of a job that has ended, and the job itself.
     * Errors: as GetJob; FAILED_PRECONDITION `JOB_NOT_FINISHED`: cancel it first.
     * </pre>
     */
    public exportd.v1.DeleteJobResponse deleteJob(exportd.v1.DeleteJobRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getDeleteJobMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Streams a finished output, whole or one part. The first message carries `metadata`
     * and no data; the others carry data in order.
     * Offsets count stored bytes, compression included. Reading from exactly the end
     * gives no data and no error. Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`,
     * `PART_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_NOT_FINISHED`, `JOB_FAILED`, `JOB_CANCELLED`, `GENERATION_MISMATCH`,
     * `PARTS_NOT_JOINABLE`; OUT_OF_RANGE `OFFSET_OUT_OF_RANGE`; RESOURCE_EXHAUSTED `READER_STALLED`; DATA_LOSS
     * `CHECKSUM_MISMATCH`.
     * </pre>
     */
    public java.util.Iterator<exportd.v1.StreamDownloadResponse> streamDownload(
        exportd.v1.StreamDownloadRequest request) {
      return io.grpc.stub.ClientCalls.blockingServerStreamingCall(
          getChannel(), getStreamDownloadMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Gives URLs that a browser or any HTTP client can download a finished output by,
     * without calling this service: one for each part, in order.
     * Who has such a URL has the data until it expires, so pass it on with care. It dies
     * with the output: at `expire_time` of the job, or when the job is deleted. Errors:
     * INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `PART_NOT_FOUND`, `OUTPUT_EXPIRED`,
     * `OUTPUT_DROPPED`; FAILED_PRECONDITION `JOB_NOT_FINISHED`, `JOB_FAILED`,
     * `JOB_CANCELLED`, `DOWNLOAD_URLS_UNAVAILABLE`; UNAVAILABLE `STORE_FAILED`.
     * </pre>
     */
    public exportd.v1.GetDownloadUrlsResponse getDownloadUrls(exportd.v1.GetDownloadUrlsRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getGetDownloadUrlsMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists deliveries to sinks, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    public exportd.v1.ListDeliveriesResponse listDeliveries(exportd.v1.ListDeliveriesRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getListDeliveriesMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Sends deliveries again that failed for good or were dropped, without exporting
     * again. What is waiting to be tried again is tried now.
     * Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `DELIVERY_NOT_FOUND`,
     * `SINK_QUEUE_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_FAILED`, `JOB_CANCELLED`, `ENDPOINT_DISABLED`.
     * </pre>
     */
    public exportd.v1.RedriveDeliveriesResponse redriveDeliveries(exportd.v1.RedriveDeliveriesRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getRedriveDeliveriesMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists the queues that the caller's deliveries stand in, or stood in, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    public exportd.v1.ListSinkQueuesResponse listSinkQueues(exportd.v1.ListSinkQueuesRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getListSinkQueuesMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lets deliveries to a disabled endpoint go on. Those that were dead-lettered stay so
     * until they are redriven. An enabled one stays as it is.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `SINK_QUEUE_NOT_FOUND`.
     * </pre>
     */
    public exportd.v1.EnableSinkQueueResponse enableSinkQueue(exportd.v1.EnableSinkQueueRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getEnableSinkQueueMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Lists who did what, newest first: of every tenant, for those who run the service.
     * Needs scope `admin`. A record appears within a moment of the end of what it tells.
     * Errors: INVALID_ARGUMENT for a bad condition, page size or token.
     * </pre>
     */
    public exportd.v1.ListAuditRecordsResponse listAuditRecords(exportd.v1.ListAuditRecordsRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getListAuditRecordsMethod(), getCallOptions(), request);
    }
  }

  /**
   * A stub to allow clients to do ListenableFuture-style rpc calls to service ExportService.
   * <pre>
   * Runs dataset exports as background jobs.
   * Every error carries `google.rpc.ErrorInfo` with domain `exportd` and a reason from
   * `ErrorReason`. Any method may answer UNAVAILABLE while the server shuts down, and
   * INTERNAL with a reference that the operator can look up.
   * Where the server wants to know who calls, credentials travel as metadata
   * `authorization: Bearer &lt;API key or token&gt;`, or as a client certificate. They say whose
   * jobs the caller sees and what it may do: scope `exports.read` for the methods that
   * only read, `exports.write` for CreateExport, CancelJob, DeleteJob, RedriveDeliveries
   * and EnableSinkQueue; `admin` is both, and ListAuditRecords, which tells of all tenants.
   * Any method may answer UNAUTHENTICATED, PERMISSION_DENIED with the scope that is
   * missing, and RESOURCE_EXHAUSTED `QUOTA_EXCEEDED` when the caller's tenant asks too often
   * or has too many calls open.
   * </pre>
   */
  public static final class ExportServiceFutureStub
      extends io.grpc.stub.AbstractFutureStub<ExportServiceFutureStub> {
    private ExportServiceFutureStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected ExportServiceFutureStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new ExportServiceFutureStub(channel, callOptions);
    }

    /**
     * <pre>
     * Lists the datasets that the caller may see, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.ListDatasetsResponse> listDatasets(
        exportd.v1.ListDatasetsRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getListDatasetsMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Describes one dataset.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `DATASET_NOT_FOUND`.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.GetDatasetResponse> getDataset(
        exportd.v1.GetDatasetRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getGetDatasetMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Checks a request, records it and answers with the job, which then runs in the
     * background.
     * With a `request_id` a repeated call is safe: the same payload answers with the job
     * that the first call made. Errors: INVALID_ARGUMENT with one violation for each bad
     * field; NOT_FOUND `DATASET_NOT_FOUND`; FAILED_PRECONDITION
     * `DATASET_NOT_EXPORTABLE`, `ENDPOINT_DISABLED` for a sink's; ALREADY_EXISTS
     * `REQUEST_ID_CONFLICT`; RESOURCE_EXHAUSTED `QUOTA_EXCEEDED`.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.CreateExportResponse> createExport(
        exportd.v1.CreateExportRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getCreateExportMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Tells where a job stands.
     * Errors: INVALID_ARGUMENT for a `job_id` that is no UUID; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.GetJobResponse> getJob(
        exportd.v1.GetJobRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getGetJobMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Lists the caller's jobs, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.ListJobsResponse> listJobs(
        exportd.v1.ListJobsRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getListJobsMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Cancels a job. Its output is refused at once and deleted. Cancelling twice, or a
     * job that has ended, changes nothing and says so.
     * Errors: as GetJob.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.CancelJobResponse> cancelJob(
        exportd.v1.CancelJobRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getCancelJobMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Deletes the output of a job that has ended, and the job itself.
     * Errors: as GetJob; FAILED_PRECONDITION `JOB_NOT_FINISHED`: cancel it first.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.DeleteJobResponse> deleteJob(
        exportd.v1.DeleteJobRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getDeleteJobMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Gives URLs that a browser or any HTTP client can download a finished output by,
     * without calling this service: one for each part, in order.
     * Who has such a URL has the data until it expires, so pass it on with care. It dies
     * with the output: at `expire_time` of the job, or when the job is deleted. Errors:
     * INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `PART_NOT_FOUND`, `OUTPUT_EXPIRED`,
     * `OUTPUT_DROPPED`; FAILED_PRECONDITION `JOB_NOT_FINISHED`, `JOB_FAILED`,
     * `JOB_CANCELLED`, `DOWNLOAD_URLS_UNAVAILABLE`; UNAVAILABLE `STORE_FAILED`.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.GetDownloadUrlsResponse> getDownloadUrls(
        exportd.v1.GetDownloadUrlsRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getGetDownloadUrlsMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Lists deliveries to sinks, newest first.
     * Errors: INVALID_ARGUMENT for a bad filter, page size or token; NOT_FOUND
     * `JOB_NOT_FOUND`.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.ListDeliveriesResponse> listDeliveries(
        exportd.v1.ListDeliveriesRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getListDeliveriesMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Sends deliveries again that failed for good or were dropped, without exporting
     * again. What is waiting to be tried again is tried now.
     * Errors: INVALID_ARGUMENT; NOT_FOUND `JOB_NOT_FOUND`, `DELIVERY_NOT_FOUND`,
     * `SINK_QUEUE_NOT_FOUND`, `OUTPUT_EXPIRED`, `OUTPUT_DROPPED`; FAILED_PRECONDITION
     * `JOB_FAILED`, `JOB_CANCELLED`, `ENDPOINT_DISABLED`.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.RedriveDeliveriesResponse> redriveDeliveries(
        exportd.v1.RedriveDeliveriesRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getRedriveDeliveriesMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Lists the queues that the caller's deliveries stand in, or stood in, by name.
     * Errors: INVALID_ARGUMENT for a bad page size or token.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.ListSinkQueuesResponse> listSinkQueues(
        exportd.v1.ListSinkQueuesRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getListSinkQueuesMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Lets deliveries to a disabled endpoint go on. Those that were dead-lettered stay so
     * until they are redriven. An enabled one stays as it is.
     * Errors: INVALID_ARGUMENT for an empty name; NOT_FOUND `SINK_QUEUE_NOT_FOUND`.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.EnableSinkQueueResponse> enableSinkQueue(
        exportd.v1.EnableSinkQueueRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getEnableSinkQueueMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Lists who did what, newest first: of every tenant, for those who run the service.
     * Needs scope `admin`. A record appears within a moment of the end of what it tells.
     * Errors: INVALID_ARGUMENT for a bad condition, page size or token.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<exportd.v1.ListAuditRecordsResponse> listAuditRecords(
        exportd.v1.ListAuditRecordsRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getListAuditRecordsMethod(), getCallOptions()), request);
    }
  }

  private static final int METHODID_LIST_DATASETS = 0;
  private static final int METHODID_GET_DATASET = 1;
  private static final int METHODID_CREATE_EXPORT = 2;
  private static final int METHODID_GET_JOB = 3;
  private static final int METHODID_LIST_JOBS = 4;
  private static final int METHODID_WATCH_JOB = 5;
  private static final int METHODID_CANCEL_JOB = 6;
  private static final int METHODID_DELETE_JOB = 7;
  private static final int METHODID_STREAM_DOWNLOAD = 8;
  private static final int METHODID_GET_DOWNLOAD_URLS = 9;
  private static final int METHODID_LIST_DELIVERIES = 10;
  private static final int METHODID_REDRIVE_DELIVERIES = 11;
  private static final int METHODID_LIST_SINK_QUEUES = 12;
  private static final int METHODID_ENABLE_SINK_QUEUE = 13;
  private static final int METHODID_LIST_AUDIT_RECORDS = 14;

  private static final class MethodHandlers<Req, Resp> implements
      io.grpc.stub.ServerCalls.UnaryMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.ServerStreamingMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.ClientStreamingMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.BidiStreamingMethod<Req, Resp> {
    private final AsyncService serviceImpl;
    private final int methodId;

    MethodHandlers(AsyncService serviceImpl, int methodId) {
      this.serviceImpl = serviceImpl;
      this.methodId = methodId;
    }

    @java.lang.Override
    @java.lang.SuppressWarnings("unchecked")
    public void invoke(Req request, io.grpc.stub.StreamObserver<Resp> responseObserver) {
      switch (methodId) {
        case METHODID_LIST_DATASETS:
          serviceImpl.listDatasets((exportd.v1.ListDatasetsRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.ListDatasetsResponse>) responseObserver);
          break;
        case METHODID_GET_DATASET:
          serviceImpl.getDataset((exportd.v1.GetDatasetRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.GetDatasetResponse>) responseObserver);
          break;
        case METHODID_CREATE_EXPORT:
          serviceImpl.createExport((exportd.v1.CreateExportRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.CreateExportResponse>) responseObserver);
          break;
        case METHODID_GET_JOB:
          serviceImpl.getJob((exportd.v1.GetJobRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.GetJobResponse>) responseObserver);
          break;
        case METHODID_LIST_JOBS:
          serviceImpl.listJobs((exportd.v1.ListJobsRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.ListJobsResponse>) responseObserver);
          break;
        case METHODID_WATCH_JOB:
          serviceImpl.watchJob((exportd.v1.WatchJobRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.WatchJobResponse>) responseObserver);
          break;
        case METHODID_CANCEL_JOB:
          serviceImpl.cancelJob((exportd.v1.CancelJobRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.CancelJobResponse>) responseObserver);
          break;
        case METHODID_DELETE_JOB:
          serviceImpl.deleteJob((exportd.v1.DeleteJobRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.DeleteJobResponse>) responseObserver);
          break;
        case METHODID_STREAM_DOWNLOAD:
          serviceImpl.streamDownload((exportd.v1.StreamDownloadRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.StreamDownloadResponse>) responseObserver);
          break;
        case METHODID_GET_DOWNLOAD_URLS:
          serviceImpl.getDownloadUrls((exportd.v1.GetDownloadUrlsRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.GetDownloadUrlsResponse>) responseObserver);
          break;
        case METHODID_LIST_DELIVERIES:
          serviceImpl.listDeliveries((exportd.v1.ListDeliveriesRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.ListDeliveriesResponse>) responseObserver);
          break;
        case METHODID_REDRIVE_DELIVERIES:
          serviceImpl.redriveDeliveries((exportd.v1.RedriveDeliveriesRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.RedriveDeliveriesResponse>) responseObserver);
          break;
        case METHODID_LIST_SINK_QUEUES:
          serviceImpl.listSinkQueues((exportd.v1.ListSinkQueuesRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.ListSinkQueuesResponse>) responseObserver);
          break;
        case METHODID_ENABLE_SINK_QUEUE:
          serviceImpl.enableSinkQueue((exportd.v1.EnableSinkQueueRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.EnableSinkQueueResponse>) responseObserver);
          break;
        case METHODID_LIST_AUDIT_RECORDS:
          serviceImpl.listAuditRecords((exportd.v1.ListAuditRecordsRequest) request,
              (io.grpc.stub.StreamObserver<exportd.v1.ListAuditRecordsResponse>) responseObserver);
          break;
        default:
          throw new AssertionError();
      }
    }

    @java.lang.Override
    @java.lang.SuppressWarnings("unchecked")
    public io.grpc.stub.StreamObserver<Req> invoke(
        io.grpc.stub.StreamObserver<Resp> responseObserver) {
      switch (methodId) {
        default:
          throw new AssertionError();
      }
    }
  }

  public static final io.grpc.ServerServiceDefinition bindService(AsyncService service) {
    return io.grpc.ServerServiceDefinition.builder(getServiceDescriptor())
        .addMethod(
          getListDatasetsMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.ListDatasetsRequest,
              exportd.v1.ListDatasetsResponse>(
                service, METHODID_LIST_DATASETS)))
        .addMethod(
          getGetDatasetMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.GetDatasetRequest,
              exportd.v1.GetDatasetResponse>(
                service, METHODID_GET_DATASET)))
        .addMethod(
          getCreateExportMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.CreateExportRequest,
              exportd.v1.CreateExportResponse>(
                service, METHODID_CREATE_EXPORT)))
        .addMethod(
          getGetJobMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.GetJobRequest,
              exportd.v1.GetJobResponse>(
                service, METHODID_GET_JOB)))
        .addMethod(
          getListJobsMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.ListJobsRequest,
              exportd.v1.ListJobsResponse>(
                service, METHODID_LIST_JOBS)))
        .addMethod(
          getWatchJobMethod(),
          io.grpc.stub.ServerCalls.asyncServerStreamingCall(
            new MethodHandlers<
              exportd.v1.WatchJobRequest,
              exportd.v1.WatchJobResponse>(
                service, METHODID_WATCH_JOB)))
        .addMethod(
          getCancelJobMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.CancelJobRequest,
              exportd.v1.CancelJobResponse>(
                service, METHODID_CANCEL_JOB)))
        .addMethod(
          getDeleteJobMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.DeleteJobRequest,
              exportd.v1.DeleteJobResponse>(
                service, METHODID_DELETE_JOB)))
        .addMethod(
          getStreamDownloadMethod(),
          io.grpc.stub.ServerCalls.asyncServerStreamingCall(
            new MethodHandlers<
              exportd.v1.StreamDownloadRequest,
              exportd.v1.StreamDownloadResponse>(
                service, METHODID_STREAM_DOWNLOAD)))
        .addMethod(
          getGetDownloadUrlsMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.GetDownloadUrlsRequest,
              exportd.v1.GetDownloadUrlsResponse>(
                service, METHODID_GET_DOWNLOAD_URLS)))
        .addMethod(
          getListDeliveriesMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.ListDeliveriesRequest,
              exportd.v1.ListDeliveriesResponse>(
                service, METHODID_LIST_DELIVERIES)))
        .addMethod(
          getRedriveDeliveriesMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.RedriveDeliveriesRequest,
              exportd.v1.RedriveDeliveriesResponse>(
                service, METHODID_REDRIVE_DELIVERIES)))
        .addMethod(
          getListSinkQueuesMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.ListSinkQueuesRequest,
              exportd.v1.ListSinkQueuesResponse>(
                service, METHODID_LIST_SINK_QUEUES)))
        .addMethod(
          getEnableSinkQueueMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.EnableSinkQueueRequest,
              exportd.v1.EnableSinkQueueResponse>(
                service, METHODID_ENABLE_SINK_QUEUE)))
        .addMethod(
          getListAuditRecordsMethod(),
          io.grpc.stub.ServerCalls.asyncUnaryCall(
            new MethodHandlers<
              exportd.v1.ListAuditRecordsRequest,
              exportd.v1.ListAuditRecordsResponse>(
                service, METHODID_LIST_AUDIT_RECORDS)))
        .build();
  }

  private static abstract class ExportServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoFileDescriptorSupplier, io.grpc.protobuf.ProtoServiceDescriptorSupplier {
    ExportServiceBaseDescriptorSupplier() {}

    @java.lang.Override
    public com.google.protobuf.Descriptors.FileDescriptor getFileDescriptor() {
      return exportd.v1.ExportServiceOuterClass.getDescriptor();
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.ServiceDescriptor getServiceDescriptor() {
      return getFileDescriptor().findServiceByName("ExportService");
    }
  }

  private static final class ExportServiceFileDescriptorSupplier
      extends ExportServiceBaseDescriptorSupplier {
    ExportServiceFileDescriptorSupplier() {}
  }

  private static final class ExportServiceMethodDescriptorSupplier
      extends ExportServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoMethodDescriptorSupplier {
    private final java.lang.String methodName;

    ExportServiceMethodDescriptorSupplier(java.lang.String methodName) {
      this.methodName = methodName;
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.MethodDescriptor getMethodDescriptor() {
      return getServiceDescriptor().findMethodByName(methodName);
    }
  }

  private static volatile io.grpc.ServiceDescriptor serviceDescriptor;

  public static io.grpc.ServiceDescriptor getServiceDescriptor() {
    io.grpc.ServiceDescriptor result = serviceDescriptor;
    if (result == null) {
      synchronized (ExportServiceGrpc.class) {
        result = serviceDescriptor;
        if (result == null) {
          serviceDescriptor = result = io.grpc.ServiceDescriptor.newBuilder(SERVICE_NAME)
              .setSchemaDescriptor(new ExportServiceFileDescriptorSupplier())
              .addMethod(getListDatasetsMethod())
              .addMethod(getGetDatasetMethod())
              .addMethod(getCreateExportMethod())
              .addMethod(getGetJobMethod())
              .addMethod(getListJobsMethod())
              .addMethod(getWatchJobMethod())
              .addMethod(getCancelJobMethod())
              .addMethod(getDeleteJobMethod())
              .addMethod(getStreamDownloadMethod())
              .addMethod(getGetDownloadUrlsMethod())
              .addMethod(getListDeliveriesMethod())
              .addMethod(getRedriveDeliveriesMethod())
              .addMethod(getListSinkQueuesMethod())
              .addMethod(getEnableSinkQueueMethod())
              .addMethod(getListAuditRecordsMethod())
              .build();
        }
      }
    }
    return result;
  }
}
