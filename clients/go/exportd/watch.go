package exportd

import (
	"context"
	"iter"

	exportdv1 "exportd.internal/go/exportd/v1"
)

// Watch gives the job as it is now, at every change and every few seconds, and ends after
// the one with a final state. It rides out restarts of the server. An error, such as
// NOT_FOUND, is the last thing it gives.
//
//	for job, err := range client.Watch(ctx, jobID) { ... }
func (c *Client) Watch(ctx context.Context, jobID string) iter.Seq2[*exportdv1.Job, error] {
	return func(yield func(*exportdv1.Job, error) bool) {
		request := &exportdv1.WatchJobRequest{JobId: jobID}
		var tries attempts
		for {
			err := each(ctx, c.streams.WatchJob, request, c.stall, func(m *exportdv1.WatchJobResponse) (bool, error) {
				tries.progress()
				return !yield(m.GetJob(), nil) || isFinal(m.GetJob().GetState()), nil
			})
			if err == nil {
				return
			}
			if ctx.Err() != nil {
				err = ctx.Err()
			} else if isCut(err) {
				err = tries.pause(ctx, err)
			}
			if err != nil {
				yield(nil, err)
				return
			}
		}
	}
}

func isFinal(state exportdv1.JobState) bool {
	switch state {
	case exportdv1.JobState_JOB_STATE_SUCCEEDED, exportdv1.JobState_JOB_STATE_FAILED, exportdv1.JobState_JOB_STATE_CANCELLED:
		return true
	default:
		return false
	}
}
