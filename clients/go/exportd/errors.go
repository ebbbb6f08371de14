package exportd

import (
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reason gives the reason of an error from the server: a name of the contract's
// ErrorReason without its prefix, such as "JOB_NOT_FOUND". It is empty for errors that did
// not come from exportd. The code and the message are those of [status.FromError].
func Reason(err error) string {
	s, ok := status.FromError(err)
	if !ok {
		return ""
	}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == "exportd" {
			return info.GetReason()
		}
	}
	return ""
}

// isCut tells whether a stream merely broke, so that another one may go on.
func isCut(err error) bool {
	var corrupt *corruptError
	if errors.As(err, &corrupt) {
		return true
	}
	s, ok := status.FromError(err)
	if !ok {
		return false
	}
	switch s.Code() {
	case codes.Unavailable:
		return true
	case codes.Internal, codes.Unknown, codes.Canceled, codes.Aborted, codes.DeadlineExceeded:
		// Proxies and broken connections produce these. With a reason of exportd's they
		// would be an answer.
		return Reason(err) == ""
	case codes.ResourceExhausted:
		reason := Reason(err)
		return reason == "" || reason == "READER_STALLED"
	default:
		return false
	}
}

// corruptError is a message of a download that is not what it should be. It may be read
// again; when that does not help it is DATA_LOSS.
type corruptError struct {
	offset int64
	what   string
}

func (e *corruptError) Error() string {
	return fmt.Sprintf("at byte %d %s; try again, and tell the operator if that does not help", e.offset, e.what)
}

func (e *corruptError) GRPCStatus() *status.Status { return status.New(codes.DataLoss, e.Error()) }
